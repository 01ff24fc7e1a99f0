"""The learning rate as a pure function of the step: nothing to save, exact on resume."""

from __future__ import annotations

import math

from orchestrator.spec.optimization import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleSpec,
)


def warmup_steps(schedule: ScheduleSpec, total_steps: int) -> int:
    """Optimizer steps of warm-up, always less than `total_steps`."""
    steps = schedule.warmup_steps
    if steps is None:
        steps = round((schedule.warmup_ratio or 0.0) * total_steps)
    return min(steps, max(total_steps - 1, 0))


def lr_factor(schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    """Share of the peak learning rate for optimizer step `step` (0-based) of `total_steps`.

    Warm-up takes steps 0…w−1 through 1/w, 2/w, …, 1, so that no step is spent at rate 0.
    """
    warm = warmup_steps(schedule, total_steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(total_steps - warm, 1)
    match schedule:
        case ConstantSchedule():
            return 1.0
        case LinearSchedule(min_lr_ratio=low):
            return low + (1 - low) * (1 - progress)
        case CosineSchedule(min_lr_ratio=low):
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
