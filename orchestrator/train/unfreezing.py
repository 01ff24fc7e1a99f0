"""Gradual unfreezing under ZeRO, which fixes at its start which weights are trained.

So all weights are in the optimizer from the start, and those that wait are kept as if they were not: their
gradient is zero before it is reduced, so that clipping does not see it; their rate is 0, so that neither
update nor decay moves them; and their optimizer state stays as new, so that the first real step is a first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orchestrator.model.parts import starting_distances
from orchestrator.plan.plan import Plan
from orchestrator.plan.unfreezing import interval_steps, moving_layers
from orchestrator.train.averaging import AVERAGE


class Unfreezing:
    """Keeps back the layers whose time has not come. `at_step` is called before each step."""

    def __init__(
        self, plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.plan, self.moving = plan, moving_layers(plan, 0)
        parameters = dict(model.named_parameters())
        for name, distance in starting_distances(model, plan.spec.tuning).items():
            if parameters[name].requires_grad:
                parameters[name].register_hook(self._gradient_of(distance))
        optimizer.register_step_post_hook(self._after_step)

    def at_step(self, step: int) -> None:
        """Let the layers move that do in step `step` (0-based)."""
        self.moving = moving_layers(self.plan, step)

    def waits(self, group: dict[str, Any]) -> bool:
        """Whether a group of the optimizer's stays as it is."""
        return bool(group["distance"] > self.moving)

    def _gradient_of(self, distance: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def kept_back(gradient: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(gradient) if distance > self.moving else gradient

        return kept_back

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in filter(self.waits, optimizer.param_groups):
            for p in group["params"]:
                state = optimizer.state[p]
                for name, value in state.items():
                    if name != AVERAGE:
                        state[name] = value.zero_() if torch.is_tensor(value) else 0


def unfreezing_of(
    plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Unfreezing | None:
    """None where all layers move from the start."""
    return None if interval_steps(plan) is None else Unfreezing(plan, model, optimizer)
