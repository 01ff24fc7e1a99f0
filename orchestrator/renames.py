"""Job fields and plan figures that had another name, for the error of a job file and for stored runs.

See docs/decisions/0128-old-field-names-are-one-table-read-at-the-edge.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

PLAN_FORMAT: Literal[2] = 2
"""Format of `plan.json` and `sweep.json`. Format 1 carries no number and has the old names."""

FIELDS: Mapping[str, str] = {
    "batch.global_rows": "batch.global_batch_size",
    "batch.micro_rows": "batch.micro_batch_size",
    "checkpoint.keep": "checkpoint.num_to_keep",
    "data.over_long": "data.truncation",
    "faults.max_restarts": "fault_tolerance.max_failures",
    "faults": "fault_tolerance",
    "regularisation.token_masking": "regularization.token_dropout",
    "regularisation": "regularization",
    "resources.num_workers.grow_every_s": "resources.num_workers.elastic_resize_monitor_interval_s",
    "storage": "storage_path",
    "sweep.scheduler.min": "sweep.scheduler.grace_period",
    "sweep.slots": "sweep.max_concurrent_trials",
    "task.beta": "task.loss.beta",
    "task.label_smoothing": "task.loss.label_smoothing",
}
"""Old name → new name. A section stands after its fields that are renamed themselves."""
VALUES: Mapping[tuple[str, str], str] = {("data.over_long", "bad_row"): "error"}
"""(old field, old value) → new value."""
PLAN_FIGURES: Mapping[str, str] = {
    "global_rows": "global_batch_size",
    "micro_rows": "micro_batch_size",
}
"""Figures of a plan in format 1 → their names now."""


def new_name(field: str) -> str:
    """Return the name that a dotted field has now."""
    for old, new in FIELDS.items():
        if field == old or field.startswith(f"{old}."):
            return new + field.removeprefix(old)
    return field


def with_new_names(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (the job with the new names, the renamed fields as old → new); the input is not changed.

    A field that is given under both names keeps the value of the new one.
    """
    out, found = _copied(spec), {}
    for old, new in FIELDS.items():
        section, name = _parent(out, old)
        if section is None or name not in section:
            continue
        value = section.pop(name)
        if isinstance(value, str):
            value = VALUES.get((old, value), value)
        found[old] = new
        _put(out, new, value)
    found |= _rename_in_sweep(out.get("sweep"))
    return out, found


def _rename_in_sweep(sweep: Any) -> dict[str, str]:
    """Rename the fields that a sweep searches and compares, in place."""
    found: dict[str, str] = {}
    if not isinstance(sweep, dict):
        return found
    space = sweep.get("space")
    if isinstance(space, dict):
        found |= {f"sweep.space.{k}": new_name(k) for k in map(str, space) if new_name(k) != k}
        sweep["space"] = {k: _with_new_condition(v) for k, v in with_new_fields(space).items()}
    constraints = sweep.get("constraints")
    if isinstance(constraints, list):
        for i, text in enumerate(constraints):
            renamed = re.sub(r"[a-z_]+(\.[a-z_]+)+", lambda match: new_name(match[0]), str(text))
            if isinstance(text, str) and renamed != text:
                found[f"sweep.constraints.{i}"] = renamed
                constraints[i] = renamed
    return found


def _with_new_condition(dimension: Any) -> Any:
    """Return a dimension of a space whose condition (`when`) has the new names."""
    if isinstance(dimension, dict) and isinstance(dimension.get("when"), dict):
        return {**dimension, "when": with_new_fields(dimension["when"])}
    return dimension


def with_new_fields(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a mapping from dotted fields to anything, with the new names."""
    return {new_name(k) if isinstance(k, str) else k: value for k, value in values.items()}


def upgraded_plan(plan: Any) -> Any:
    """Return the content of a `plan.json` or `sweep.json` of an older format as it is written now."""
    if not isinstance(plan, dict) or plan.get("format_version", 1) != 1:
        return plan
    out = {PLAN_FIGURES.get(key, key): value for key, value in plan.items()}
    out["format_version"] = PLAN_FORMAT
    if isinstance(spec := out.get("spec"), dict):
        out["spec"] = with_new_names(spec)[0]
    if "base" in out and isinstance(base := out["base"], dict) and "spec" in base:
        out["base"] = upgraded_plan(base)  # a sweep's plan holds that of a trial
    if isinstance(reasons := out.get("reasons"), dict):
        out["reasons"] = {PLAN_FIGURES.get(key, key): why for key, why in reasons.items()}
    for name in ("settings", "defaults"):
        if isinstance(listed := out.get(name), list):
            out[name] = [
                {**one, "field": new_name(str(one["field"]))} if "field" in one else one
                for one in listed
                if isinstance(one, dict)
            ]
    return out


def upgraded(file: str, content: Any) -> Any:
    """Return the content of a stored JSON file of that name as it is written now."""
    if file in ("plan.json", "sweep.json"):
        return upgraded_plan(content)
    if file == "orchestrator.json" and isinstance(content, dict):
        return {**content, "plan": upgraded_plan(content.get("plan"))}
    return content


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _parent(data: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """Return (the section that holds a dotted field, the field's own name); None without the section."""
    *sections, name = path.split(".")
    here: Any = data
    for section in sections:
        here = here.get(section) if isinstance(here, dict) else None
    return (here if isinstance(here, dict) else None), name


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted field unless it is given; a section is merged into one that is there."""
    *sections, name = path.split(".")
    here = data
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            return
        here = inner
    if isinstance(value, dict) and isinstance(here.get(name), dict):
        here[name] = {**value, **here[name]}
    else:
        here.setdefault(name, value)
