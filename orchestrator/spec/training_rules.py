"""Rules across the fields of training: optimizer, schedule, stopping."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import Problem
from orchestrator.spec.job import JobSpec

NO_EVAL_ROWS = "has no rows to be measured on"
GIVE_EVAL_ROWS = "set data.eval, or data.eval_fraction=0.1, or drop it"


def training_rules(spec: JobSpec) -> Iterator[Problem]:
    """Every rule about training's knobs that `spec` breaks."""
    yield from _optimizer(spec)
    yield from _schedule(spec)
    yield from _stop(spec)
    yield from _regularization(spec)


def _optimizer(spec: JobSpec) -> Iterator[Problem]:
    optimizer, zero = spec.optimizer, spec.zero
    yield from optimizer.broken_rules()
    if not optimizer.whole_matrices:
        return
    why = f"cuts weights into flat pieces, and {optimizer.whole_matrices}"
    if zero.stage not in (0, "auto"):
        fix = "zero.stage: 0, or optimizer.type: adamw or lion"
        yield Problem("zero.stage", why, fix, zero.stage)
    for field in ("offload_optimizer", "offload_param"):
        if getattr(zero, field) == "cpu":
            yield Problem(f"zero.{field}", f"needs ZeRO, which {why}", "drop it", "cpu")


def _schedule(spec: JobSpec) -> Iterator[Problem]:
    schedule, max_steps = spec.schedule, spec.stop.max_steps
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield Problem("schedule.warmup_ratio", "excludes schedule.warmup_steps", "keep one")
    if max_steps is not None and (schedule.warmup_steps or 0) >= max_steps:
        yield Problem(
            "schedule.warmup_steps",
            f"the warm-up must end before stop.max_steps = {max_steps}",
            f"at most {max_steps - 1}",
            schedule.warmup_steps,
        )
    yield from schedule.broken_rules(spec.task.type, spec.task.metric_names)
    if schedule.decided_by_evaluations:
        yield from _needs_evaluations(spec, "schedule.type", schedule.type)


def _stop(spec: JobSpec) -> Iterator[Problem]:
    stop = spec.stop
    for field in ("target", "patience", "overfitting_evals", "max_loss_ratio"):
        if (value := getattr(stop, field)) is not None:
            yield from _needs_evaluations(spec, f"stop.{field}", value)
    if "min_delta" in stop.model_fields_set and stop.patience is None:
        yield Problem("stop.min_delta", "has no effect without stop.patience", "drop it")


def _needs_evaluations(spec: JobSpec, field: str, value: object) -> Iterator[Problem]:
    """Yield problems of fields that use evaluations in a job without any."""
    if not (spec.data.eval or spec.data.eval_fraction):
        yield Problem(field, NO_EVAL_ROWS, GIVE_EVAL_ROWS, value)
    elif spec.evaluation.every_steps == "end":
        fix = "evaluation.every_steps: epoch, or a number of steps"
        yield Problem(field, "looks at evaluations before the end, and there are none", fix, value)


def _regularization(spec: JobSpec) -> Iterator[Problem]:
    settings, task = spec.regularization, spec.task
    for field in ("label_smoothing", "r_drop_alpha"):
        if getattr(settings, field) and task.soft_targets is None:
            why = f"needs a prediction per class or token, and {task.type} makes none: {task.no_soft_targets}"
            fix = f"task.{field}" if field in type(task).model_fields else "drop it"
            yield Problem(f"regularization.{field}", why, fix, getattr(settings, field))
    if settings.label_smoothing and task.soft_targets == "number":
        why = f"shares probability out among classes, and {task.type} has none"
        value = settings.label_smoothing
        yield Problem("regularization.label_smoothing", why, "drop it", value)
    for field in ("neftune_alpha", "token_dropout"):
        if getattr(settings, field) and not task.reads_text:
            why = f"works on words, which {task.type} does not read"
            yield Problem(f"regularization.{field}", why, "drop it", getattr(settings, field))
    if settings.class_weights is not None and not task.label_feature:
        why = f"needs labels, which {task.type} does not have"
        yield Problem("regularization.class_weights", why, "drop it", settings.class_weights)
    if settings.mixup_alpha is not None and not task.one_label:
        why = f"needs one label per row, which {task.type} does not have"
        yield Problem("regularization.mixup_alpha", why, "drop it", settings.mixup_alpha)
    if settings.mixup_alpha is not None and settings.r_drop_alpha is not None:
        why = "excludes regularization.r_drop_alpha: both decide what a row is paired with"
        yield Problem("regularization.mixup_alpha", why, "keep one", settings.mixup_alpha)
    if settings.r_drop_alpha is not None and spec.model.dropout == 0:
        why = "needs dropout, or both passes are the same"
        fix = "model.dropout=0.1, or drop it"
        yield Problem("regularization.r_drop_alpha", why, fix, settings.r_drop_alpha)
    weights, labels = settings.class_weights, getattr(task, "labels", None)
    if isinstance(weights, dict) and labels:
        yield from _labels_of(weights, labels)


def _labels_of(weights: dict[str, float], labels: tuple[str, ...]) -> Iterator[Problem]:
    for label in sorted(weights.keys() - set(labels)):
        fix = f"choose from: {', '.join(labels)}"
        yield Problem("regularization.class_weights", "is not among task.labels", fix, label)
