"""The learning rate as a pure function of the step: nothing to save, exact on resume.

The one schedule that looks at results, `plateau`, is a pure function of the evaluations so far; those
are in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.errors import PlanError
from orchestrator.spec.schedule import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PlateauSchedule,
    PolynomialSchedule,
    ScheduleSpec,
    StepSchedule,
    WSDSchedule,
)


def warmup_steps(schedule: ScheduleSpec, total_steps: int) -> int:
    """Optimizer steps of warm-up, always less than `total_steps`."""
    steps = schedule.warmup_steps
    if steps is None:
        steps = round((schedule.warmup_ratio or 0.0) * total_steps)
    return min(steps, max(total_steps - 1, 0))


def check_schedule(schedule: ScheduleSpec, total_steps: int) -> None:
    """Raises PlanError for a warm-up that never ends, and for more restarts than there is room for: a cosine
    takes two steps at least."""
    if (schedule.warmup_steps or 0) >= total_steps:
        raise PlanError(
            f"schedule.warmup_steps = {schedule.warmup_steps}: there are {total_steps} steps in all, so the rate would "
            f"never reach its peak. Set at most {total_steps - 1}, or schedule.warmup_ratio, or train longer."
        )
    room = (total_steps - warmup_steps(schedule, total_steps)) // 2 - 1
    if isinstance(schedule, CosineSchedule) and schedule.restarts > max(room, 0):
        raise PlanError(
            f"schedule.restarts = {schedule.restarts}: {total_steps} steps have room for {max(room, 0)} at most, "
            "as each cosine takes two steps or more. Lower it, or train longer."
        )


def lr_factor(schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    """Share of the peak learning rate for optimizer step `step` (0-based) of `total_steps`.

    Warm-up takes steps 0…w−1 through 1/w, 2/w, …, 1, so that no step is spent at rate 0.
    """
    warm = warmup_steps(schedule, total_steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(total_steps - warm, 1)
    match schedule:
        case ConstantSchedule() | PlateauSchedule():
            return 1.0
        case LinearSchedule(min_lr_ratio=low):
            return low + (1 - low) * (1 - progress)
        case CosineSchedule(min_lr_ratio=low, restarts=restarts):
            within = _within_cycle(step - warm, total_steps - warm, restarts + 1)
            return low + (1 - low) * _half_cosine(within)
        case PolynomialSchedule(min_lr_ratio=low, power=power):
            return low + (1 - low) * max(1 - progress, 0) ** power
        case ExponentialSchedule(min_lr_ratio=low):
            return low**progress
        case StepSchedule(gamma=gamma):
            return gamma ** _drops(schedule, step, warm, total_steps)
        case InverseSqrtSchedule():
            return math.sqrt(max(warm, 1) / (step + 1))
        case WSDSchedule(min_lr_ratio=low):
            return low + (1 - low) * _wsd(schedule, step, warm, total_steps)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _within_cycle(step: int, steps: int, cycles: int) -> float:
    """Progress inside the present of `cycles` equal cycles, by whole numbers: a restart is at the peak."""
    if step >= steps:
        return 1.0
    return (step * cycles % steps) / steps


def _drops(schedule: StepSchedule, step: int, warm: int, total_steps: int) -> int:
    if schedule.every_steps is not None:
        return (step - warm) // schedule.every_steps
    after, whole = step - warm, total_steps - warm
    return sum(after >= math.ceil(share * whole - 1e-9) for share in schedule.milestones)


def _wsd(schedule: WSDSchedule, step: int, warm: int, total_steps: int) -> float:
    decay_steps = max(1, min(round(schedule.decay_ratio * total_steps), total_steps - warm))
    progress = max(0.0, (step - (total_steps - decay_steps)) / decay_steps)
    match schedule.shape:
        case "linear":
            return 1 - progress
        case "cosine":
            return _half_cosine(progress)
        case "sqrt":
            return 1 - math.sqrt(progress)


def plateau_factor(
    schedule: ScheduleSpec, values: Sequence[float], higher_is_better: bool
) -> float:
    """Return the factor on the learning rate after evaluations with `values`; 1 for all schedules but `plateau`.

    A value that is not finite counts as no better.
    """
    if not isinstance(schedule, PlateauSchedule):
        return 1.0
    sign = 1.0 if higher_is_better else -1.0
    left = list(schedule.thresholds)
    best, waited, cooling, drops = -math.inf, 0, 0, 0
    for value in (sign * v if math.isfinite(v) else -math.inf for v in values):
        reached = [t for t in left if value >= sign * t]
        drops += len(reached)
        left = [t for t in left if t not in reached]
        better = value > best + schedule.min_delta
        best = max(best, value) if better else best
        waited = 0 if better or cooling else waited + 1
        cooling = max(0, cooling - 1)
        if schedule.patience is not None and waited >= schedule.patience:
            drops, waited, cooling = drops + 1, 0, schedule.cooldown
    return max(schedule.factor**drops, schedule.min_lr_ratio)


def planned_rates(
    schedule: ScheduleSpec, lr: float, total_steps: int, most: int = 200
) -> tuple[tuple[int, float], ...]:
    """(step, counted from 1, learning rate) at no more than about `most` steps, the first and last among them."""
    stride = max(1, math.ceil(total_steps / most))
    steps = sorted({*range(0, total_steps, stride), total_steps - 1})
    return tuple((s + 1, lr * lr_factor(schedule, s, total_steps)) for s in steps)
