"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.optimizers.base import (
    OF_STATE,
    DefaultLr,
    Implementation,
    Optimizer,
    Probability,
)

LR_RATIO = 0.2
"""Lion's rate as a share of AdamW's: Chen et al., arXiv 2302.06675, say 3 to 10 times less."""


class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al., arXiv 2302.06675): half of Adam's state."""

    sources: ClassVar[Mapping[str, str]] = {
        "betas": "Chen et al., arXiv 2302.06675",
        "weight_decay": "five times AdamW's: Chen et al., arXiv 2302.06675, say 3 to 10 times",
    }

    type: Annotated[Literal["lion"], OF_STATE]
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    """Interpolation for the step, and decay of the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled decay, 3 to 10 times more than for AdamW; norms and biases are left out of it."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 1: the momentum."""
        return 1

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return the product's own class."""
        return Implementation("orchestrator.train.lion.Lion", "torch has none")

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return betas."""
        return {"betas": self.betas}

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return a fifth of AdamW's."""
        return DefaultLr(
            adam.lr * LR_RATIO,
            "a fifth of AdamW's; Chen et al., arXiv 2302.06675, say 3 to 10 times less. "
            f"AdamW's: {adam.source}",
        )
