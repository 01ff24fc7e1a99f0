"""Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al., arXiv 2302.06675, program 1).

    Element by element, so flat pieces of the weights, as ZeRO hands out, give the same steps.
    `params`: groups with `lr` and `weight_decay`. State: one value per element.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            interpolation, decay = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                momentum, gradient = state["exp_avg"], p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(gradient, momentum, interpolation).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - decay)
        return loss
