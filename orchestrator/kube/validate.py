"""What a cluster would say of manifests, before one is asked. Every problem at once."""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.errors import Problem, SpecError
from orchestrator.kube.core_schema import (
    HOW_TO_GET,
    POD_TEMPLATE,
    definitions,
    schema_named,
    schema_of_kind,
)
from orchestrator.kube.kuberay import RayCluster, RayCronJob, RayJob
from orchestrator.kube.rules import broken_rules
from orchestrator.kube.schema import Schemas, near, path_of, schema_problems, with_defaults

RAY_KINDS: dict[str, type[RayJob] | type[RayCluster] | type[RayCronJob]] = {
    "RayJob": RayJob,
    "RayCluster": RayCluster,
    "RayCronJob": RayCronJob,
}
POD_FIELDS = ("template", "submitterPodTemplate")
"""Where KubeRay's objects hold pods."""


@dataclass(frozen=True)
class Checked:
    """What was looked at: kinds with their counts, and what could not be checked, with the reason."""

    kinds: dict[str, int]
    unchecked: tuple[str, ...]


def validate(path: Path, crds: Schemas | None = None) -> Checked:
    """Check every document of a file: fields, then the rules across them.

    `crds`: a cluster's own schemas, held against as well. Raises SpecError with all problems, each under
    the object it stands in.
    """
    documents = _read(path)
    problems: list[Problem] = []
    unchecked: list[str] = []
    for one in documents:
        name = f"{one['kind']} {(one['metadata'] or {}).get('name', '')}".strip()
        problems += [
            Problem(f"{name}: {p.field}", p.why, p.fix, p.value) for p in problems_of(one, crds)
        ]
        if reason := _not_checked(one, crds or {}):
            unchecked.append(f"{name}: {reason}")
    if problems:
        raise SpecError(problems, str(path))
    return Checked(dict(Counter(one["kind"] for one in documents)), tuple(unchecked))


def problems_of(document: dict[str, Any], crds: Schemas | None = None) -> list[Problem]:
    """Everything that is wrong with one object. Each field is named once."""
    document = _without_nulls(document)
    found = _own_problems(document)
    schema = (crds or {}).get((document["apiVersion"], document["kind"]))
    if schema is not None:
        told = {problem.field for problem in found}
        theirs = schema_problems(with_defaults(document, schema), schema)
        found += [problem for problem in theirs if problem.field not in told]
    return found


def _own_problems(document: dict[str, Any]) -> list[Problem]:
    """By our models and rules for KubeRay's kinds, by Kubernetes' schemas for its own."""
    model = RAY_KINDS.get(document["kind"])
    if model is None or not document["apiVersion"].startswith("ray.io/"):
        schema = schema_of_kind(document["apiVersion"], document["kind"])
        return schema_problems(document, schema) if schema else []
    pods = [p for at, pod in _pods(document) for p in _pod_problems(pod, at)]
    try:
        return broken_rules(model.model_validate(document)) + pods
    except ValidationError as error:
        return _field_problems(error, model) + _rules_beside(error, document, model) + pods


def _rules_beside(error: ValidationError, document: dict[str, Any], model: Any) -> list[Problem]:
    """Rules that break beside the broken fields, which are left out, so that one typo hides nothing."""
    repaired = document
    for detail in error.errors(include_url=False):
        repaired = _without(repaired, detail["loc"])
    try:
        return broken_rules(model.model_validate(repaired))
    except ValidationError:  # something that is required is wrong
        return []


def _without(value: Any, location: tuple[int | str, ...]) -> Any:
    first, *rest = location
    if isinstance(value, dict):
        inner = {first: _without(value[first], tuple(rest))} if rest and first in value else {}
        return {k: v for k, v in value.items() if k != first} | inner
    if isinstance(value, list) and isinstance(first, int) and rest and first < len(value):
        return [_without(v, tuple(rest)) if i == first else v for i, v in enumerate(value)]
    return value


def _pods(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Pod templates, and where they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{at}.{key}".lstrip(".")
            if key in POD_FIELDS:
                yield path, inner
            else:
                yield from _pods(inner, path)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _pods(inner, f"{at}[{index}]")


def _pod_problems(pod: Any, at: str) -> list[Problem]:
    schema = schema_named(POD_TEMPLATE)
    return schema_problems(pod, schema, at) if schema else []


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError([Problem(str(path), f"cannot be read: {error}")], str(path)) from error
    documents = [one for one in found if one is not None]
    broken = [
        Problem(
            f"document {i}", "is no Kubernetes object", "apiVersion, kind and metadata are needed"
        )
        for i, one in enumerate(documents, 1)
        if not _is_object(one)
    ]
    if broken or not documents:
        raise SpecError(broken or [Problem(str(path), "holds no object")], str(path))
    return documents


def _is_object(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("apiVersion"), str)
        and isinstance(one.get("kind"), str)
        and isinstance(one.get("metadata"), dict | None)
        and "metadata" in one
    )


def _not_checked(document: dict[str, Any], crds: Schemas) -> str:
    """Why an object, or the pods in it, went unchecked."""
    version, kind = document["apiVersion"], document["kind"]
    if (version, kind) in crds:
        return ""
    if version.startswith("ray.io/") and kind not in RAY_KINDS:
        return "its schema is not known here: give --crds"
    if definitions() is None:
        return f"{'its pods' if kind in RAY_KINDS else 'it'} went unchecked: {HOW_TO_GET}"
    if kind in RAY_KINDS or schema_of_kind(version, kind):
        return ""
    return "its kind is none of Kubernetes' own: give --crds"


def _without_nulls(value: Any) -> Any:
    """The API server takes a null for an absent field."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _field_problems(error: ValidationError, model: Any) -> list[Problem]:
    """Pydantic's errors in Kubernetes' spelling."""
    out: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        field = path_of(detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                known = _known_fields(model, detail["loc"][:-1])
                problem = Problem(field, "unknown field", near(str(detail["loc"][-1]), known))
            case "missing":
                problem = Problem(field, "is required", "add it")
            case _:
                why = detail["msg"].replace("Input should be ", "must be ")
                value = detail["input"]
                shown = value if isinstance(value, str | int | float | bool) else None
                problem = Problem(field, why[:1].lower() + why[1:], "", shown)
        out.setdefault(field, problem)
    return list(out.values())


def _known_fields(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Names that the model at `location` knows, as Kubernetes spells them."""
    for part in location:
        by_alias = {info.alias: info for info in model.model_fields.values()}
        if part in by_alias:
            model = next(iter(_models(by_alias[str(part)].annotation)), model)
    return sorted(info.alias for info in model.model_fields.values())


def _models(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]
