"""Averages of the weights, kept beside the optimizer's state: one shard per rank, saved with it.

See docs/decisions/0026-weight-averages-are-optimizer-state.md.
"""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.plan.plan import Plan

AVERAGED_FILE = "averaged.pt"
"""The averages in one piece inside a checkpoint, for export."""
AVERAGE = "average"
"""Name of the average in the optimizer's state. DeepSpeed shards and saves what stands there."""


def average_share(plan: Plan, step: int) -> float:
    """Return how far the average moves towards the weights after step `step` (0-based): 1 copies them, 0 leaves it."""
    averaging = plan.spec.regularization.averaging
    return averaging.share(step, plan.total_steps, plan.steps_per_epoch)


class Averager:
    """Moves the average after each of the optimizer's steps.

    It works on whatever the optimizer steps, whole weights or flat fp32 pieces of them, since an average
    goes element by element. `share` is set before each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.share = 1.0
        self.optimizer = optimizer
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = optimizer.state[p]
                if AVERAGE not in state or self.share == 1:
                    state[AVERAGE] = p.detach().clone()
                elif self.share:
                    state[AVERAGE].lerp_(p, self.share)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap weights and averages; twice is as before, bit for bit."""
        for p, state in self.optimizer.state.items():
            if AVERAGE in state:
                weights = p.detach().clone()
                p.copy_(state[AVERAGE])
                state[AVERAGE].copy_(weights)


def add_l1(optimizer: torch.optim.Optimizer, l1: float) -> None:
    """After each step, shrink every weight that is not spared by rate × `l1`, and no further than 0."""

    @torch.no_grad()
    def shrink(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if not group["spared"]:
                for p in group["params"]:
                    if p.grad is not None:
                        p.copy_(torch.nn.functional.softshrink(p, group["lr"] * l1))

    optimizer.register_step_post_hook(shrink)
