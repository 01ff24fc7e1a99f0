"""Regularization: penalties, noise, and averages of the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.spec.averaging import AveragingSpec, NoAveraging
from orchestrator.values import Frozen


class RegularizationSpec(Frozen):
    """Penalties, noise and averaging. L2 is `optimizer.weight_decay`, dropout is `model.dropout`."""

    l1: Annotated[float, Field(ge=0)] = 0.0
    """L1 penalty on the weights, not on norms and biases. A proximal step after the optimizer's: every
    weight shrinks by rate × `l1` and stops at 0 (Duchi & Singer, JMLR 10, 2009)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability given to all classes alike (Szegedy et al., arXiv 1512.00567), of each label to yes and no
    where a text has several; in training only."""
    class_weights: (
        Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
        | Literal["balanced"]
        | None
    ) = None
    """Weight of the loss by label: of a row, of a word that is tagged, or, where a text has several labels, of
    those that hold. `balanced` makes rare labels count as much as frequent ones: rows (or words) / (labels × those
    of the label); with several labels, rows without the label / rows with it."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the token embeddings, of size alpha / √(tokens × width) (NEFTune: Jain et al.,
    arXiv 2310.05914, who use 5 to 15)."""
    r_drop_alpha: Annotated[float, Field(gt=0)] | None = None
    """Run every row twice with other dropout and pull the two predictions together by so much (R-Drop:
    Liang et al., arXiv 2106.14448, who use 1 to 5). Needs dropout; doubles activations and time."""
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the tokens that are replaced by the mask token, or by the unknown token where there is none.
    Special tokens and targets stay."""
    mixup_alpha: Annotated[float, Field(gt=0)] | None = None
    """Tasks with one label per row: mix pixels, or the embeddings of words, and labels of pairs of rows by a
    share drawn from Beta(alpha, alpha) (mixup: Zhang et al., arXiv 1710.09412; on words: Guo et al.,
    arXiv 1905.08941). Partners are of one micro-batch, which needs two rows or more."""
    averaging: Annotated[AveragingSpec, Affects(Effect.CHECKPOINT, Effect.TRAINING)] = NoAveraging()
    """Average of the weights that is evaluated and exported instead of the last ones."""
