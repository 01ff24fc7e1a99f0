"""Learning from a larger model's outputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.spec.paths import PathText
from orchestrator.values import Frozen

TEACHER = Affects(Effect.ROWS, Effect.TRAINING, names_content=True)
Layer = Annotated[int, Field(ge=1)]
"""A layer's output, counted from 1."""


class HiddenSpec(Frozen):
    """Hidden states of the teacher as hints (FitNets: Romero et al., arXiv 1412.6550; layer by layer:
    TinyBERT, Jiao et al., arXiv 1909.10351)."""

    layers: Annotated[
        dict[Layer, Layer] | Literal["last", "even"],
        Affects(Effect.ROWS, Effect.CHECKPOINT, Effect.TRAINING),
    ] = "last"
    """Student's layer → teacher's layer, from 1 (`{1: 2, 3: 6}`). `last`: the last from the last. `even`: all
    layers of the student, at equal distances in the teacher; its layers must be a multiple."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the mean squared difference, added to the rest of the loss."""


class DistillationSpec(Frozen):
    """The loss is (1 − alpha) × the task's own + alpha × temperature² × the divergence from the teacher's
    softened outputs (Hinton et al., arXiv 1503.02531). The teacher runs once over the prepared training
    rows as they are, without masking or noise; what it says is stored beside them."""

    teacher: Annotated[PathText, TEACHER]
    """Hub id, folder of a model, or run folder with an export; trained for the same task and labels, with
    the student's tokenizer, where the task reads text."""
    revision: Annotated[str | None, TEACHER] = None
    """Branch, tag or commit of the teacher on the hub."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Outputs are divided by it before the softmax, on both sides: above 1, small probabilities count more.
    Without meaning for text_regression, where the squared difference of the two numbers is learned."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's loss; the rest is the task's own."""
    top_k: Annotated[int, Field(ge=1)] = 64
    """Language models and seq2seq: tokens whose probability is stored at each position. All others count as
    one."""
    hidden: HiddenSpec | None = None
    """Also pull hidden states towards the teacher's, through a linear projection that is trained along and
    left out of the export."""
    teacher_rows: Annotated[int, Field(ge=1), Affects()] = 32
    """Rows per forward pass of the teacher."""
    compare_rows: Annotated[int | None, Field(ge=1), Affects()] = 1000
    """Most evaluation rows on which teacher and student are compared for the report at the end, in the
    driver's process; null leaves it out. A sweep's report has no such comparison: train its `best.yaml`."""
