"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.optimizers.base import OF_STATE, DefaultLr, Implementation, Optimizer

FULL = DefaultLr(1e-3, "Raffel et al., arXiv 1910.10683, fine-tuned T5 with Adafactor at 1e-3")
BY_TUNING = {
    "ia3": DefaultLr(3e-3, "Liu et al., arXiv 2205.05638, tuned IA³ with Adafactor at 3e-3"),
    "prompt": DefaultLr(
        0.3, "Lester et al., arXiv 2104.08691, tuned prompts with Adafactor at 0.3"
    ),
}
"""Kind of tuning → learning rate, where a paper used another than that of full tuning."""


class Adafactor(Optimizer):
    """Adam's second moment as one row and one column per matrix (Shazeer & Stern, arXiv 1804.04235).

    Needs whole matrices, so ZeRO stage 0: from stage 1 on the optimizer sees flat pieces of them.
    """

    whole_matrices = "adafactor needs the rows and columns of whole matrices"
    sources: ClassVar[Mapping[str, str]] = {
        "decay_rate": "Shazeer & Stern, arXiv 1804.04235",
        "clip_threshold": "Shazeer & Stern, arXiv 1804.04235",
    }

    type: Annotated[Literal["adafactor"], OF_STATE]
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    """The second moment decays by 1 − step^decay_rate."""
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0
    """Largest root mean square of one matrix's update, in units of `lr`."""
    scale_parameter: bool = False
    """Multiply `lr` by the root mean square of the matrix it moves."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay; norms and biases are left out of it."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 0: a row and a column per matrix are nothing beside the weights."""
        return 0

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return transformers' class."""
        return Implementation(
            "transformers.optimization.Adafactor", "with rates from the schedule, not its own"
        )

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return the fields; its own relative steps would override the schedule."""
        fields = {"decay_rate", "clip_threshold", "scale_parameter"}
        return {"lr": lr, "relative_step": False, **self.model_dump(include=fields)}

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return that of a paper which used Adafactor."""
        return BY_TUNING.get(tuning, FULL)
