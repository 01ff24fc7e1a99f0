"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.errors import Problem
from orchestrator.spec.optimizers.base import (
    OF_STATE,
    DefaultLr,
    Implementation,
    Momentum,
    Optimizer,
)


class SGD(Optimizer):
    """Stochastic gradient descent with optional (Nesterov) momentum."""

    sources: ClassVar[Mapping[str, str]] = {
        "momentum": "Sutskever et al., ICML 2013, and most work since",
        "weight_decay": "none unless asked for",
    }

    type: Annotated[Literal["sgd"], OF_STATE]
    momentum: Momentum = 0.9
    """0 is plain SGD."""
    nesterov: bool = False
    """Look-ahead momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient; norms and biases are left out of it."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 1 with momentum, 0 without."""
        return int(self.momentum > 0)

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return torch's class."""
        return Implementation("torch.optim.SGD")

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return momentum, and the rate, which torch requires."""
        return {"lr": lr, "momentum": self.momentum, "nesterov": self.nesterov}

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return a common start."""
        return DefaultLr(
            1e-2, "a common start and no more: no source settles it; search optimizer.lr"
        )

    def broken_rules(self) -> Iterator[Problem]:
        """Nesterov's look-ahead needs momentum."""
        if self.nesterov and self.momentum == 0:
            yield Problem("optimizer.nesterov", "needs momentum above 0", "momentum: 0.9", True)
