"""The learning rate that a plan shows."""

from __future__ import annotations

import math

from orchestrator.spec.schedule import Schedule


def planned_rates(
    schedule: Schedule, lr: float, total_steps: int, most: int = 200
) -> tuple[tuple[int, float], ...]:
    """Return (step, counted from 1, learning rate) at about `most` steps, the first and last among them."""
    stride = max(1, math.ceil(total_steps / most))
    steps = sorted({*range(0, total_steps, stride), total_steps - 1})
    return tuple((s + 1, lr * schedule.lr_factor(s, total_steps)) for s in steps)
