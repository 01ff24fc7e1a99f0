"""Merge a user's fields into a pod template, and check the result with Kubernetes' schema.

See docs/decisions/0032-pod-fields-are-overridden-by-a-strategic-merge.md.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from typing import Any

from orchestrator.errors import Problem

KUBERNETES_VERSION = "1.34"
"""The version whose schemas are used, of those in the package `kubernetes-validate`."""
POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"

KEYS = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name",
    "volumeMounts": "mountPath", "ports": "containerPort", "imagePullSecrets": "name",
    "hostAliases": "ip", "topologySpreadConstraints": "topologyKey",
}  # fmt: skip
"""Lists that Kubernetes' strategic merge patch merges by a key, as in its API."""


def merged(base: Any, patch: Any, name: str = "") -> Any:
    """Return `base` with `patch` merged into it; neither is changed.

    Mappings are merged by key, the lists in `KEYS` by their entries' key, and anything else is replaced. A
    null in a mapping removes the field. `name` is the field that holds `base`.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        out = {k: v for k, v in base.items() if k not in patch}
        laid = {k: merged(base.get(k), v, k) for k, v in patch.items() if v is not None}
        order = [k for k in base if k in laid or k in out] + [k for k in laid if k not in base]
        return {k: laid[k] if k in laid else out[k] for k in order}
    if isinstance(patch, dict):
        return merged({}, patch, name)
    key = KEYS.get(name)
    if isinstance(base, list) and isinstance(patch, list) and key and _keyed(base + patch, key):
        laid_by = {entry[key]: entry for entry in patch}
        known = {entry[key] for entry in base}
        return [merged(entry, laid_by.get(entry[key], {})) for entry in base] + [
            entry for entry in patch if entry[key] not in known
        ]
    return patch


def _keyed(entries: list[Any], key: str) -> bool:
    return all(
        isinstance(entry, dict) and isinstance(entry.get(key), str | int) for entry in entries
    )


def pod_problems(template: dict[str, Any], path: str) -> list[Problem]:
    """Return everything that Kubernetes' schema refuses in the pod template at `path`.

    Without the package `kubernetes-validate` nothing is checked.
    """
    definitions = _definitions()
    if definitions is None:
        return []
    from jsonschema import Draft202012Validator

    schema = {"$ref": f"#/$defs/{POD_TEMPLATE}", "$defs": definitions}
    errors = Draft202012Validator(schema).iter_errors(_without_nulls(template))
    return [_problem(error, path) for error in errors]


@lru_cache(maxsize=1)
def _definitions() -> dict[str, Any] | None:
    try:
        package = files("kubernetes_validate")
    except ModuleNotFoundError:
        return None
    folder = package / "kubernetes-json-schema" / f"v{KUBERNETES_VERSION}.0-local-strict"
    schemas = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    definitions: dict[str, Any] = schemas["$defs"]
    return definitions


def _problem(error: Any, path: str) -> Problem:
    field = path + _path_of(error.absolute_path)
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else "remove it"
        return Problem(f"{field}.{unknown}", "unknown field", fix)
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return Problem(f"{field}.{missing}", "is required", "add it")
    value = error.instance if isinstance(error.instance, str | int | float | bool) else None
    message = error.message if len(error.message) < 160 else f"{error.message[:150]} …"
    return Problem(field, message, "", value)


def _path_of(location: Iterable[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _without_nulls(value: Any) -> Any:
    """Return `value` without nulls, which the API server takes for absent fields."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value
