"""Settings of a task that are the model's own unless the job names others."""

from __future__ import annotations

from orchestrator.model.config import raw_config
from orchestrator.spec import JobSpec


def with_own_settings(spec: JobSpec) -> JobSpec:
    """Return the job with every `auto` field of its task filled from the model.

    What the job sets itself stays, and so does the record of which fields it sets.

    Raises:
        OrchestratorError: the model's own settings cannot be read.
    """
    task = spec.task
    if not task.open_fields:
        return spec
    filled = task.filled(spec.model.pretrained, spec.model.revision, raw_config(spec))
    copy = spec.model_copy(update={"task": filled})
    object.__setattr__(copy, "__pydantic_fields_set__", set(spec.model_fields_set))
    return copy
