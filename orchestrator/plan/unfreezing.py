"""Which layers move at which step: a pure function, so that a resume needs nothing saved."""

from __future__ import annotations

from orchestrator.plan.plan import Plan
from orchestrator.spec.tuning import FullTuning


def interval_steps(plan: Plan) -> int | None:
    """Steps after which one layer more moves; None where nothing waits."""
    tuning = plan.spec.tuning
    if not isinstance(tuning, FullTuning) or tuning.unfreeze_every_steps is None:
        return None
    every = tuning.unfreeze_every_steps
    return plan.steps_per_epoch if every == "epoch" else every


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
    below = max(plan.model.layers, plan.model.decoder_layers) + 1
    return 1 + every * max(0, below - (tuning.last_layers or 0))
