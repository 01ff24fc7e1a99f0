"""Layers that are trained at each step: a pure function, so a resume needs nothing saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.spec.tuning import FullTuning, TuningSpec

if TYPE_CHECKING:  # a plan holds `unfreezing_steps`
    from orchestrator.plan.plan import Plan


def interval_steps(plan: Plan) -> int | None:
    """Steps after which one layer more moves; None where nothing waits."""
    return _interval(plan.spec.tuning, plan.steps_per_epoch)


def _interval(tuning: TuningSpec, steps_per_epoch: int) -> int | None:
    if not isinstance(tuning, FullTuning) or tuning.unfreeze_every_steps is None:
        return None
    every = tuning.unfreeze_every_steps
    return steps_per_epoch if every == "epoch" else every


def unfreezing_steps(
    tuning: TuningSpec, layers: int, steps_per_epoch: int, total_steps: int
) -> tuple[tuple[int, int], ...]:
    """(step, counted from 1, layers from the top that move from then on); empty where nothing waits.

    One number beyond `layers` are the embeddings.
    """
    every = _interval(tuning, steps_per_epoch)
    if every is None or not isinstance(tuning, FullTuning):
        return ()
    begin = tuning.last_layers or 0
    steps = ((1 + i * every, begin + i) for i in range(max(0, layers + 1 - begin) + 1))
    return tuple((step, moving) for step, moving in steps if step <= total_steps)


def moving_layers(plan: Plan, step: int) -> int:
    """Layers from the top that move in step `step` (0-based) beside the head; 0 where nothing waits.

    One number beyond the layers are the embeddings (`model.parts.distances`).
    """
    every, tuning = interval_steps(plan), plan.spec.tuning
    if every is None or not isinstance(tuning, FullTuning):
        return 0
    return (tuning.last_layers or 0) + step // every


def all_move_at_step(plan: Plan) -> int:
    """The step (1-based) from which every weight moves that ever will."""
    every, tuning = interval_steps(plan), plan.spec.tuning
    if every is None or not isinstance(tuning, FullTuning):
        return 1
    below = plan.model.deepest + 1
    return 1 + every * max(0, below - (tuning.last_layers or 0))
