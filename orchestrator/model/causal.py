"""Language models that predict the next token: whether a model is one, and how its rows hold several documents."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.architectures import auto_class
from orchestrator.model.config import load_config
from orchestrator.model.preprocessing import with_own_settings
from orchestrator.model.probe import Probe, probe
from orchestrator.model.teacher import teacher_spec
from orchestrator.spec import JobSpec
from orchestrator.tasks.packing import Packing


def settled(spec: JobSpec) -> JobSpec:
    """The job with `task.packing` as its models allow it, and the task's open fields filled from the model:
    prepared rows and batches depend on both.

    Raises OrchestratorError for a model that sees later tokens.
    """
    spec = with_own_settings(spec)
    if not getattr(spec.task, "packing", False):
        return spec
    return _with_packing(spec, how_packed(spec)[0])


def how_packed(spec: JobSpec) -> tuple[Packing, str]:
    """(how documents in one row are kept apart, why), for a task that packs rows.

    A teacher reads the same rows: where it cannot keep documents apart, none are packed.
    """
    found = probed(spec)
    if found.packing and spec.distillation is not None:
        theirs = probed(teacher_spec(spec))
        if not theirs.packing:
            return False, f"the teacher: {theirs.why}"
    return found.packing, found.why


def teacher_job(spec: JobSpec) -> JobSpec:
    """The job with the teacher in place of its model, its rows packed as they are, read as the teacher reads them."""
    taught = teacher_spec(spec)
    if not getattr(spec.task, "packing", False):
        return taught
    return _with_packing(taught, probed(taught).packing or True)


def check_causal(spec: JobSpec) -> None:
    """Raises OrchestratorError where the task predicts next tokens and the model sees later ones."""
    if spec.task.reads_left_to_right:
        probed(spec)


def probed(spec: JobSpec) -> Probe:
    """Return the probe of a small copy of the job's model.

    Raises OrchestratorError where it sees later tokens: it would learn to copy them.
    """
    wanted = getattr(spec.task, "packing", False)
    model = spec.model.model_dump(mode="json", exclude_none=True)
    key = repr((model, spec.task.type, "mask" if wanted == "mask" else True))
    found = _probed(_Job(key, spec))
    if found.causal is not False:
        return found
    config = load_config(spec, ())
    where = "model.config" if spec.model.config is not None else "the model's config.json"
    fix = f"Set is_decoder: true in {where}, or choose" if found.causal_as_decoder else "Choose"
    raise OrchestratorError(
        f"model: {config.model_type} sees the tokens that {spec.task.type} is to predict: it attends in both "
        f"directions. {fix} a causal language model."
    )


class _Job:
    """A job that equals others with the same key."""

    def __init__(self, key: str, spec: JobSpec) -> None:
        self.key, self.spec = key, spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)
def _probed(job: _Job) -> Probe:
    spec = job.spec
    config: Any = load_config(spec, ())
    wanted: Packing = "mask" if getattr(spec.task, "packing", False) == "mask" else True
    return probe(config, auto_class(spec, config), spec.model.attention, wanted)


def _with_packing(spec: JobSpec, packing: Packing) -> JobSpec:
    task = spec.task.model_copy(update={"packing": packing})
    return spec.model_copy(update={"task": task})
