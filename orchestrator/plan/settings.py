"""List every training setting that the job makes, with its name in the job file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from orchestrator.spec import JobSpec
from orchestrator.spec.field_docs import field_docs
from orchestrator.spec.validation_errors import first_sentence
from orchestrator.values import Frozen

SECTIONS = (
    "task", "model", "tuning", "optimizer", "schedule", "regularization", "distillation", "stop", "precision",
    "gradient_clipping", "gradient_checkpointing", "seed",
)  # fmt: skip
"""Other sections have rows of their own: what follows from them is more than what they say."""


class Setting(Frozen):
    """A field of the job, its value, and why it is that or what it does."""

    field: str
    value: str
    why: str


def settings(spec: JobSpec) -> tuple[Setting, ...]:
    """Return the fields that the job sets, in the order of the job file, each with its meaning."""
    return tuple(_set_fields(spec, "", SECTIONS))


def _set_fields(model: BaseModel, path: str, only: tuple[str, ...] = ()) -> Iterator[Setting]:
    for name in type(model).model_fields:
        if name not in model.model_fields_set or (only and name not in only):
            continue
        value, field = getattr(model, name), f"{path}{name}"
        if isinstance(value, BaseModel):
            yield from _set_fields(value, f"{field}.")
            continue
        meaning = type(model).__doc__ if name == "type" else field_docs(type(model)).get(name)
        yield Setting(field=field, value=shown(value), why=first_sentence(meaning))


def shown(value: Any) -> str:
    """A field's value as text."""
    match value:
        case BaseModel():
            return str(getattr(value, "type", value))
        case None:
            return "none"
        case dict():
            return ", ".join(f"{key}: {shown(one)}" for key, one in value.items())
        case list() | tuple():
            return ", ".join(shown(one) for one in value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)
