"""RMSProp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.optimizers.base import (
    OF_STATE,
    DefaultLr,
    Implementation,
    Momentum,
    Optimizer,
    Probability,
    Rate,
)


class RMSProp(Optimizer):
    """Steps divided by a moving root mean square of the gradient (Hinton, Coursera lecture 6e, 2012)."""

    sources: ClassVar[Mapping[str, str]] = {
        "alpha": "torch's; Hinton's lecture 6e has 0.9",
        "eps": "torch's",
    }

    type: Annotated[Literal["rmsprop"], OF_STATE]
    alpha: Probability = 0.99
    """Decay of the mean square."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    momentum: Momentum = 0.0
    """Momentum on the divided gradient."""
    centered: Annotated[bool, OF_STATE] = False
    """Divide by the standard deviation instead (Graves, arXiv 1308.0850)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient; norms and biases are left out of it."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 1 for the mean square, and 1 each for momentum and the mean of the gradient."""
        return 1 + int(self.momentum > 0) + int(self.centered)

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return torch's class."""
        return Implementation("torch.optim.RMSprop")

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return all fields that torch's class has."""
        return self.model_dump(include={"alpha", "eps", "momentum", "centered"})

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return Adam's."""
        return DefaultLr(adam.lr, f"as for Adam, which is RMSProp with momentum: {adam.source}")
