"""YAML text → plain values. Whatever PyYAML raises becomes a SpecError that names the line."""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

from orchestrator.errors import Problem, SpecError

FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
"""Numbers with an exponent. PyYAML reads only those with a dot and a sign: `1e-4` would be text."""
MAX_VALUES = 100_000
"""Values in a job file, aliases counted as often as they are used."""
MAX_INT_BITS = 1024
"""Longest integer: a longer one than a float holds is a mistake, and Python does not print very long ones."""


class Dumper(yaml.SafeDumper):
    """Quote the text `1e-4`, as the loader reads the bare one as a number."""


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader keeps the last of two equal keys; a job file must not hide one."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError, KeyError, TypeError) as error:
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"is no {kind} ({error}); put it in quotes", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *defaults` is no key; what it brings may be overridden
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # the safe loader refuses it by line and column
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _yaml in (_UniqueKeys, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Return the value that YAML text holds: mappings, lists, texts, numbers, booleans and null.

    Raises SpecError where it is not YAML, or holds anything else.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
        problems = list(_problems(data))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else source
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SpecError([Problem(where, f"not valid YAML: {why}")], source) from error
    except RecursionError as error:
        raise SpecError([Problem(source, "is nested too deeply")], source) from error
    if problems:
        raise SpecError(problems[:20], source)
    return data


def _problems(data: Any) -> Iterator[Problem]:
    """Yield what no job file may hold: dates, bytes, sets, huge integers, endless or exploding aliases."""
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", data, ())]
    seen = 0
    while waiting:
        path, value, parents = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            yield Problem(
                "job", f"holds more than {MAX_VALUES:,} values", "write out no such aliases"
            )
            return
        if why := _scalar_problem(value):
            yield Problem(path or "job", *why)
        elif id(value) in parents:
            yield Problem(path, "is an alias of itself", "write out the values")
        elif isinstance(value, dict | list):
            inner = (*parents, id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                name = f"{path}.{key}".lstrip(".") if isinstance(key, str | int) else path
                if isinstance(value, dict) and (why := _key_problem(key)):
                    yield Problem(path or "job", *why)
                else:
                    waiting.append((name, item, inner))


def _key_problem(key: Any) -> tuple[str, str] | None:
    if isinstance(key, str | int | float | bool):
        return _scalar_problem(key)
    shown = "null" if key is None else f"a {type(key).__name__}"
    return f"has {shown} as a key", "keys are names; put them in quotes"


def _scalar_problem(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a single value, and the fix."""
    if isinstance(value, bool) or value is None or isinstance(value, float | dict | list):
        return None
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            return "is too long an integer", "put it in quotes if it is a text"
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds half of a surrogate pair", "write the character itself"
        return None
    if isinstance(value, datetime.date):
        return f"is read as a date ({value})", "put it in quotes"
    return f"is a {type(value).__name__}, which no field takes", "write a text, a number or a list"
