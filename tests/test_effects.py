"""What another value of a job field changes is declared on the field, and the rules follow from it."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from orchestrator.effects import (
    NOT_SEARCHED,
    Affects,
    DecidedBy,
    Effect,
    changes_between,
    decided_by,
    effect_of,
    fields_of,
    may_change_on_resume,
    names_content,
    without,
)
from orchestrator.spec import JobSpec
from orchestrator.values import Frozen


class Small(Frozen):
    """A section."""

    lr: Annotated[float, Affects(Effect.TRAINING)] = 0.1
    momentum: Annotated[float, Affects(Effect.TRAINING), Affects(Effect.CHECKPOINT, at=0)] = 0.9
    folder: Annotated[str, Affects(Effect.ROWS, names_content=True)] = "rows"
    note: str = ""
    patience: Annotated[int | None, Field(ge=1), DecidedBy(("every",))] = None
    limits: dict[str, int] = Field(default={})


class Other(Frozen):
    """Another kind of the section."""

    type: Literal["other"] = "other"
    lr: Annotated[float, Affects(Effect.MODEL)] = 0.1


class Job(Frozen):
    """A job."""

    name: Annotated[str, Affects()] = "job"
    every: Annotated[int, Affects(Effect.DECISIONS)] = 1
    part: Annotated[Small | Other, Affects(Effect.MODEL)] = Small()


def test_a_field_has_its_own_effect_or_that_of_its_section() -> None:
    assert effect_of(Job, "name") == Effect(0)
    assert effect_of(Job, "part") == Effect.MODEL
    assert effect_of(Job, "part.note") == Effect.MODEL
    assert effect_of(Job, "part.lr") == Effect.TRAINING | Effect.MODEL, "of all kinds"
    assert effect_of(Job, "part.limits.cpu") == Effect.MODEL, "keys of a mapping"
    assert effect_of(Job, "unknown") == Effect(0)
    assert names_content(Job, "part.folder")
    assert not names_content(Job, "part.note")


def test_a_switch_counts_only_where_it_is_met() -> None:
    def changes(path: str, *values: object) -> Effect:
        return changes_between(Job, path, values)

    assert not changes("part.momentum", 0.5, 0.9) & Effect.CHECKPOINT
    assert changes("part.momentum", 0, 0.9) & Effect.CHECKPOINT
    assert changes("part", {}, {}) & Effect.CHECKPOINT, "a section may hold any value"


def test_sections_and_fields_without_an_effect_are_excluded_from_a_dump() -> None:
    excluded = without(Job, Effect.MODEL)
    assert excluded == {"name": True, "every": True, "part": {"momentum", "folder"}}
    assert Job().model_dump(exclude=excluded) == {
        "part": {"lr": 0.1, "note": "", "patience": None, "limits": {}}
    }


def test_only_fields_that_are_set_decide() -> None:
    assert decided_by(Job()) == {}
    assert decided_by(Job(part=Small(patience=3))) == {"every": ["part.patience = 3"]}
    assert may_change_on_resume(Job, "every", ())
    assert not may_change_on_resume(Job, "every", ("every",))


@pytest.mark.parametrize("name", JobSpec.model_fields)
def test_every_section_of_a_job_declares_what_it_changes(name: str) -> None:
    own = [one for one in JobSpec.model_fields[name].metadata if isinstance(one, Affects)]
    assert len(own) == 1


@pytest.mark.parametrize(
    "path",
    [
        "name", "storage_path", "runtime", "runtime.pip", "tracking", "checkpoint", "checkpoint.every_steps",
        "fault_tolerance", "kubernetes.queue", "evaluation.baseline_rows", "stop.max_time_s", "data.prepared_dir",
        "distillation.teacher_rows", "distillation.compare_rows", "resources.cpus_per_worker",
        "resources.num_workers", "resources.num_workers.min", "sweep.num_trials", "sweep.max_concurrent_trials",
        "sweep.budget.max_time_s", "sweep.keep_trials", "sweep.max_trial_failures",
    ],
)  # fmt: skip
def test_a_run_resumes_with_another_value_of(path: str) -> None:
    assert may_change_on_resume(JobSpec, path)


@pytest.mark.parametrize(
    "path",
    [
        "task", "task.threshold", "model.pretrained", "data", "data.train", "data.order.shuffle", "tuning.r",
        "optimizer", "optimizer.lr", "schedule.warmup_steps", "regularization.l1", "distillation.alpha",
        "batch.micro_batch_size", "precision", "gradient_clipping", "gradient_checkpointing", "zero.stage",
        "stop.max_steps", "evaluation", "evaluation.metric", "resources", "resources.gpus_per_worker", "seed",
        "sweep", "sweep.space", "sweep.scheduler.grace_period", "sweep.seed",
    ],
)  # fmt: skip
def test_a_run_does_not_resume_with_another_value_of(path: str) -> None:
    assert path in fields_of(JobSpec)
    assert not may_change_on_resume(JobSpec, path)


@pytest.mark.parametrize(
    "path",
    [
        "name", "storage_path", "sweep", "sweep.seed", "tracking", "checkpoint.every_steps", "fault_tolerance",
        "evaluation.metric", "data.prepared_dir", "resources.cpus_per_worker", "resources.gpus_per_worker",
        "runtime.pip", "kubernetes",
    ],
)  # fmt: skip
def test_a_sweep_does_not_search(path: str) -> None:
    assert not effect_of(JobSpec, path) & ~NOT_SEARCHED


@pytest.mark.parametrize(
    "path", ["optimizer", "seed", "resources.num_workers", "stop.max_time_s", "task.threshold"]
)
def test_a_sweep_searches(path: str) -> None:
    assert effect_of(JobSpec, path) & ~NOT_SEARCHED


@pytest.mark.parametrize(
    ("path", "values", "other_state"),
    [
        ("optimizer.lr", (1e-3, 1e-2), False),
        ("optimizer.type", ("adamw", "sgd"), True),
        ("optimizer", ({"type": "adamw"}, {"type": "sgd"}), True),
        ("optimizer.momentum", (0.5, 0.9), False),
        ("optimizer.momentum", (0, 0.9), True),
        ("optimizer.layer_decay", (0.8, 0.9), False),
        ("optimizer.layer_decay", (0.8, 1), True),
        ("optimizer.head_lr", (None, 1e-3), True),
        ("regularization", ({}, {"l1": 1}), True),
        ("regularization.l1", (0.0, 1.0), False),
        ("regularization.averaging.decay", (0.9, 0.99), True),
        ("schedule", ({"type": "linear"}, {"type": "cosine"}), False),
        ("distillation.alpha", (0.1, 0.2), False),
        ("distillation.hidden.layers", ("last", "even"), True),
        ("tuning.r", (4, 8), True),
        ("stop.max_steps", (10, 20), True),
    ],
)  # fmt: skip
def test_another_value_needs_another_checkpoint(
    path: str, values: tuple[object, ...], other_state: bool
) -> None:
    assert bool(changes_between(JobSpec, path, values) & Effect.CHECKPOINT) == other_state


def test_rows_do_not_depend_on_what_is_made_of_outputs() -> None:
    kept = {
        "threshold",
        "max_answer_tokens",
        "num_beams",
        "bleu_tokenize",
        "loss",
        "center_coefficient",
        "mean",
        "std",
        "channel_order",
    }
    excluded = without(JobSpec, Effect.ROWS)["task"]
    assert kept <= excluded
    assert not {"type", "labels", "text_column"} & excluded
