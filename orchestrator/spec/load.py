"""YAML and dotted overrides → a frozen JobSpec, or every problem at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.errors import Problem, SpecError
from orchestrator.renames import with_new_names
from orchestrator.spec.job import JobSpec
from orchestrator.spec.paths import plain_path
from orchestrator.spec.rules import Files, broken_rules
from orchestrator.spec.validation_errors import problems_from
from orchestrator.spec.yaml_text import Dumper, parse_yaml

STAND_INS: dict[str, Any] = {
    "name": "job",
    "task": {"type": "causal_lm", "packing": False},
    "model": {"pretrained": "org/model"},
    "data": {"train": "memory://"},
}
"""Required fields with values that break no rule, for the search for further problems."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises SpecError where the file cannot be read, is not YAML or is not a mapping.
    """
    source = str(path)
    try:
        text = Path(plain_path(str(path))).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SpecError([Problem(source, f"cannot be read: {why}")], source) from error
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise SpecError([Problem(source, "a job file is a mapping of fields to values")], source)
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with each `dotted.key=value` set; values are read as YAML. The input is not changed."""
    problems: list[Problem] = []
    result: dict[str, Any] = dict(data)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            problems.append(
                Problem(override, "is not an override", "write key=value, as in optimizer.lr=3e-5")
            )
            continue
        try:
            value = parse_yaml(text, key)
        except SpecError as error:
            why = error.problems[0].why.removeprefix("not valid YAML: ")
            problems.append(Problem(key, f"its value cannot be read: {why}", "quote it", text))
            continue
        result = _with_value(result, key.strip().split("."), value)
    if problems:
        raise SpecError(problems, "overrides")
    return result


def _with_value(data: Any, path: list[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    copy = dict(data) if isinstance(data, dict) else {}
    copy[head] = _with_value(copy.get(head), rest, value) if rest else value
    return copy


def parse_spec(
    data: dict[str, Any], source: str = "job", files: Files = "here", stored: bool = False
) -> JobSpec:
    """Validate a mapping.

    Args:
        data: the job as it was written.
        source: its name in the error.
        files: where the job's local paths are looked for.
        stored: it comes from a run folder, so fields may have the names of an older version.

    Raises SpecError with all problems: old names, single fields, and fields that do not go together.
    """
    data, renamed = with_new_names(data)
    problems = [] if stored else [_renamed(old, new) for old, new in renamed.items()]
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        found = problems_from(error, data)
        beside = _rules_beside(data, error, found, files)
        raise SpecError(problems + found + beside, source) from error
    problems += broken_rules(spec, files)
    if problems:
        raise SpecError(problems, source)
    return spec


def _renamed(old: str, new: str) -> Problem:
    return Problem(old, "is the old name of this field", f"write {new}")


def _rules_beside(
    data: dict[str, Any], error: ValidationError, found: list[Problem], files: Files
) -> list[Problem]:
    """Rules across fields that break beside the broken fields.

    The broken fields are put back to their defaults, and sections of an unknown kind too, so that
    one typo does not hide the rest.
    """
    repaired = data
    for problem in found:
        repaired = _without(repaired, problem.field.removesuffix(".type").split("."))
    if "task" not in repaired:  # its metrics are not known
        repaired = _without(repaired, ["evaluation"])
    repaired = {**STAND_INS, **repaired}
    repaired["data"] = {**STAND_INS["data"], **repaired["data"]}
    if _breaks_eval(found) and not {"eval", "eval_fraction"} & repaired["data"].keys():
        repaired["data"]["eval"] = STAND_INS["data"]["train"]  # they are wrong, not missing
    try:
        spec = JobSpec.model_validate(repaired)
    except ValidationError:
        return []
    broken = [f"{problem.field}." for problem in found]
    return [
        p for p in broken_rules(spec, files) if not any(b.startswith(f"{p.field}.") for b in broken)
    ]


def _breaks_eval(found: list[Problem]) -> bool:
    fields = ("data", "data.eval", "data.eval_fraction")
    return any(p.field in fields or p.field.startswith("data.eval.") for p in found)


def _without(data: dict[str, Any], path: list[str]) -> dict[str, Any]:
    head, *rest = path
    if rest and isinstance(data.get(head), dict):
        return {k: (_without(v, rest) if k == head else v) for k, v in data.items()}
    return {k: v for k, v in data.items() if k != head}


def load_spec(
    path: str | Path,
    overrides: Sequence[str] = (),
    files: Files = "here",
    stored: bool = False,
) -> JobSpec:
    """Read a job file, apply `key=value` overrides, validate. See `parse_spec`.

    Raises SpecError listing every problem found.
    """
    return parse_spec(apply_overrides(read_yaml(path), overrides), str(path), files, stored)


def dump_spec(spec: JobSpec) -> str:
    """The spec as YAML that `load_spec` reads back to an equal value; unset fields stay unset."""
    data = spec.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)
