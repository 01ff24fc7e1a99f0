"""Turn pydantic's errors into problems of the job file: one per field, with the nearest name and the fix."""

from __future__ import annotations

import difflib
import re
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import Problem
from orchestrator.spec.field_docs import field_docs
from orchestrator.spec.job import JobSpec
from orchestrator.values import model_members

OTHER_NAMES: dict[str, list[str]] = {
    "batch_size": ["batch.global_batch_size"],
    "bf16": ["precision"],
    "early_stopping_patience": ["stop.patience"],
    "epochs": ["stop.max_epochs"],
    "ema": ["regularization.averaging"],
    "fp16": ["precision"],
    "gradient_accumulation_steps": ["batch.global_batch_size", "batch.micro_batch_size"],
    "l2": ["optimizer.weight_decay"],
    "label_smoothing_factor": ["regularization.label_smoothing"],
    "learning_rate": ["optimizer.lr"],
    "lora": ["tuning.type"],
    "lr_scheduler": ["schedule.type"],
    "lr_scheduler_type": ["schedule.type"],
    "max_grad_norm": ["gradient_clipping"],
    "max_length": ["data.max_length_tokens"],
    "metric_for_best_model": ["evaluation.metric"],
    "num_epochs": ["stop.max_epochs"],
    "num_train_epochs": ["stop.max_epochs"],
    "per_device_train_batch_size": ["batch.micro_batch_size"],
    "scheduler": ["schedule.type"],
    "swa": ["regularization.averaging"],
}
"""What other tools call a field → where it is here."""


def problems_from(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """One Problem per field: the alternatives of a union are joined into one sentence."""
    by_field: dict[str, list[ErrorDetails]] = {}
    found = error.errors(include_url=False)
    inside = {detail["loc"][: len(detail["loc"]) - 1] for detail in found}
    for detail in found:
        if detail["type"] == "too_short" and detail["loc"] in inside:
            continue  # its items were refused, each by itself
        by_field.setdefault(_field_path(detail, data), []).append(detail)
    return [_problem(field, details, data) for field, details in by_field.items()]


def _field_path(detail: ErrorDetails, data: Any) -> str:
    """The location as the user wrote it, without the names pydantic adds for union members."""
    path: list[str] = []
    here: Any = data
    for part in detail["loc"]:
        inside = isinstance(here, dict) and part in here
        if inside or (
            isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        ):
            path.append(str(part))
            here = here[part]
    if detail["type"] == "missing":
        path.append(str(detail["loc"][-1]))
    return ".".join(path) or "job"


def _problem(field: str, details: list[ErrorDetails], data: dict[str, Any]) -> Problem:
    detail = details[0]
    parents, _, last = field.rpartition(".")
    match detail["type"]:
        case "missing":
            return Problem(field, "is required", _purpose(field, data))
        case "extra_forbidden":
            model = _model_at(parents.split(".") if parents else [], data)
            names = list(model.model_fields) if model else []
            fix = _elsewhere(last, data) or _nearest(last, names, "known here")
            return Problem(field, "is not a field", fix)
        case "union_tag_invalid":
            names = [n.strip("' ") for n in detail["ctx"]["expected_tags"].split(",")]
            tag = detail["ctx"]["tag"]
            return Problem(f"{field}.type", "is an unknown type", _nearest(tag, names), tag)
        case "union_tag_not_found":
            return Problem(field, "needs a `type`", _purpose(field, data))
        case _:
            why = " or ".join(dict.fromkeys(_sentence(d) for d in details))
            hints = [hint for hint in map(_hint, details) if hint]
            return Problem(field, why, hints[0] if hints else "", detail["input"])


def _sentence(detail: ErrorDetails) -> str:
    message = detail["msg"]
    if detail["type"] == "string_pattern_mismatch":
        return "must be lower-case letters, digits, '.', '_' or '-', at most 63 characters"
    if message.startswith("Input should be "):
        return f"must be {message.removeprefix('Input should be ')}"
    return message[:1].lower() + message[1:]


def _hint(detail: ErrorDetails) -> str:
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes, or YAML takes it for a number or for true or false"
    if detail["type"] != "literal_error" or not isinstance(value, str):
        return ""
    options = detail["ctx"]["expected"].replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(value, [o.strip("'") for o in options], n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _elsewhere(word: str, data: dict[str, Any]) -> str:
    """Return the section of a field of this name, or of what other tools mean by it; empty if there is none."""
    sections = {
        f"{section}.{name}": name
        for section in JobSpec.model_fields
        for name in getattr(_model_at([section], data), "model_fields", ())
        if name != "type"
    }
    found = [path for path, name in sections.items() if name == word] or OTHER_NAMES.get(word, [])
    return f"did you mean {' or '.join(found)}?" if found else ""


def _nearest(word: str, names: list[str], label: str = "choose from") -> str:
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"{label}: {', '.join(names)}" if names else ""


def _purpose(field: str, data: dict[str, Any]) -> str:
    """The first sentence of a field's documentation."""
    parents, _, last = field.rpartition(".")
    model = _model_at(parents.split(".") if parents else [], data)
    return first_sentence(field_docs(model).get(last)) if model else ""


def first_sentence(text: str | None) -> str:
    """Of a field's or a kind's documentation, without its full stop; abbreviations (et al.) end none."""
    found = re.match(r".+?(?<! al)[.](?= [A-Z`]|$)", " ".join((text or "").split()))
    return found[0].removesuffix(".") if found else " ".join((text or "").split())


def _model_at(path: list[str], data: Any) -> type[BaseModel] | None:
    """The spec class that describes `path`; a tagged union is resolved by the data's own `type`."""
    model: type[BaseModel] = JobSpec
    here = data
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
        if part not in model.model_fields:
            return None
        members = model_members(model.model_fields[part].annotation)
        tag = here.get("type") if isinstance(here, dict) else None
        chosen = [m for m in members if tag in _tags(m)] or [m for m in members if not _tags(m)]
        chosen = chosen or [m for m in members if not m.model_fields["type"].is_required()]
        if not chosen:
            return None
        model = chosen[0]
    return model


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    info = model.model_fields.get("type")
    return typing.get_args(info.annotation) if info else ()
