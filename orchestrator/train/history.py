"""What the evaluations so far decide, and the clock. Pure but for `remember`: the same on all ranks, and
after a resume."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.plan import Plan
from orchestrator.train.state import Progress
from orchestrator.train.stopping import reason_to_stop


def remember(plan: Plan, progress: Progress, record: dict[str, Any]) -> None:
    """Keep an evaluation's figures, beside the training loss since the one before.

    One at a sweep's rung, or made because time is up, is not kept: the job alone, or with more time,
    would not have made it, and what follows from the history (a plateau's rate, patience) must be the same.
    """
    progress.last_eval = record
    if progress.step % plan.eval_every_steps and progress.step != plan.total_steps:
        return
    record["train_loss"] = progress.loss_sum / max(progress.targets, 1)
    progress.loss_sum, progress.targets = 0.0, 0
    kept = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "eval_s"}
    progress.history.append(kept)


def rate_factor(plan: Plan, progress: Progress) -> float:
    """What the evaluations so far have left of the planned rate."""
    schedule = plan.spec.schedule
    name = schedule.watched_metric(plan.metric)
    values = [record[name] for record in progress.history if name in record]
    return schedule.evaluation_factor(values, plan.spec.task.metric(name))


def out_of_time(plan: Plan, progress: Progress) -> bool:
    """Whether training has lasted as long as it may."""
    limit_s = plan.spec.stop.max_time_s
    return limit_s is not None and progress.elapsed_s >= limit_s


def ended_early(plan: Plan, progress: Progress) -> str:
    """Why the evaluations so far, or the clock, end training before its last step; empty where they do not."""
    judged = (plan.spec.stop, progress.history, plan.selection_metric)
    why = reason_to_stop(*judged, progress.first_loss)
    measured = plan.eval_data is None or (progress.last_eval or {}).get("step") == progress.step
    if not why and measured and out_of_time(plan, progress):
        why = f"it took {progress.elapsed_s:.0f} s, stop.max_time_s = {plan.spec.stop.max_time_s:g}"
    if not why or progress.step >= plan.total_steps:
        return ""
    return f"stopped early at step {progress.step} of {plan.total_steps}: {why}"
