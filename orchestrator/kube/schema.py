"""CRD schemas → JSON Schema: what the API server of one cluster would say of a custom resource."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import OrchestratorError, Problem

Schemas = dict[tuple[str, str], dict[str, Any]]
"""By API version (`ray.io/v1`) and kind."""


def read_crds(path: Path) -> Schemas:
    """The schemas in a file, or in all files of a folder: `kubectl get crd … -o yaml`, or KubeRay's own.

    Raises OrchestratorError where none is found.
    """
    files = sorted(p for p in path.rglob("*") if p.suffix in (".yaml", ".yml", ".json"))
    found: Schemas = {}
    for file in files if path.is_dir() else [path]:
        try:
            documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise OrchestratorError(f"--crds {file}: cannot be read: {error}") from error
        for crd in _definitions(documents):
            names, group = crd["spec"]["names"], crd["spec"]["group"]
            for version in crd["spec"]["versions"]:
                key = (f"{group}/{version['name']}", names["kind"])
                found[key] = closed(version["schema"]["openAPIV3Schema"])
    if not found:
        raise OrchestratorError(
            f"--crds {path}: holds no CustomResourceDefinition. "
            "`kubectl get crd rayjobs.ray.io rayclusters.ray.io -o yaml` writes them."
        )
    return found


def _definitions(documents: list[Any]) -> Iterator[dict[str, Any]]:
    for one in documents:
        if isinstance(one, dict) and one.get("kind") == "CustomResourceDefinition":
            yield one
        elif isinstance(one, dict) and isinstance(one.get("items"), list):
            yield from _definitions(one["items"])


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as JSON Schema: closed where the API server would drop unknown fields."""
    out = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes") and k != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
        out.pop("anyOf", None)
    if "properties" in schema:
        out["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), dict):
        out["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = closed(schema["additionalProperties"])
    return out


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """`value` with the schema's defaults, as the API server fills them in before it validates."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        other = schema.get("additionalProperties")
        filled = {k: s["default"] for k, s in known.items() if "default" in s and k not in value}
        filled |= value
        rest = other if isinstance(other, dict) else {}
        return {k: with_defaults(v, known.get(k, rest)) for k, v in filled.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(one, schema["items"]) for one in value]
    return value


def schema_problems(value: Any, schema: dict[str, Any], at: str = "") -> list[Problem]:
    """Everything in `value` that a JSON Schema refuses."""
    from jsonschema import Draft202012Validator

    found = Draft202012Validator(schema).iter_errors(value)
    return [_problem(error, at) for error in found]


def path_of(location: Iterable[int | str]) -> str:
    """`spec.groups[0].name`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")


def _problem(error: Any, at: str) -> Problem:
    field = path_of([*([at] if at else []), *error.absolute_path])
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        return Problem(f"{field}.{unknown}".lstrip("."), "unknown field", near(unknown, known))
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return Problem(f"{field}.{missing}".lstrip("."), "is required", "add it")
    value = error.instance if isinstance(error.instance, str | int | float | bool) else None
    return Problem(field or "object", _short(error.message), "", value)


def _short(message: str) -> str:
    return message if len(message) < 160 else f"{message[:150]} …"


def near(word: str, known: list[str]) -> str:
    """A fix for an unknown word: the nearest known one."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "drop it"
