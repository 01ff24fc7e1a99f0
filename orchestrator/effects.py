"""Metadata of job fields: what another value of a field changes.

A field declares it once, as `Annotated[float, Affects(Effect.TRAINING)]`; a field without it has that of
its section. Rules on resuming, on search spaces, on models that stay in memory and on prepared rows ask
`effect_of` instead of keeping lists of names.

See docs/decisions/0129-a-field-declares-what-a-change-of-it-affects.md.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.values import model_members


class Effect(enum.Flag):
    """Consequences of another value of a field; no member at all for a field without any."""

    ROWS = enum.auto()
    """Prepared rows."""
    MODEL = enum.auto()
    """The model before the first step."""
    CHECKPOINT = enum.auto()
    """What a checkpoint holds, or means: weights, optimizer state, position in the data."""
    TRAINING = enum.auto()
    """The steps: rows, loss, gradient or learning rate."""
    ROUNDING = enum.auto()
    """The order in which numbers are added up, and nothing else."""
    LENGTH = enum.auto()
    """How long a run may take, and nothing else."""
    PREDICTION = enum.auto()
    """What is made of the model's outputs, and so the metrics."""
    DECISIONS = enum.auto()
    """Evaluations, and the decisions that rest on them (`DecidedBy`)."""
    DEVICE = enum.auto()
    """The hardware that a run needs."""
    SEARCH = enum.auto()
    """The trials of a sweep."""


NOTHING = Effect(0)
NOT_SEARCHED = Effect.DECISIONS | Effect.DEVICE | Effect.SEARCH


class Affects:
    """The consequences of another value of the field.

    Args:
        effects: joined; none for a field that changes nothing.
        at: the effects hold only between this value and any other one.
        names_content: the field names files or a model: another name for the same content changes nothing.
    """

    def __init__(self, *effects: Effect, at: Any = ..., names_content: bool = False) -> None:
        self.effect = NOTHING
        for one in effects:
            self.effect |= one
        self.at, self.names_content = at, names_content


@dataclass(frozen=True)
class DecidedBy:
    """The field, where it is set, decides by these other fields; `unless` a sibling of it is set."""

    fields: tuple[str, ...]
    unless: str = ""


def declared(info: FieldInfo) -> list[Affects]:
    """Return what a field itself declares."""
    return [one for one in info.metadata if isinstance(one, Affects)]


@cache
def fields_of(job: type[BaseModel]) -> dict[str, tuple[Affects, ...]]:
    """Return dotted path → what holds for the field, of a job and of all sections inside it.

    A field of several kinds of a union has the effects of all of them.
    """
    found: dict[str, tuple[Affects, ...]] = {}
    for path, affects in _walk(job, "", ()):
        found[path] = tuple(dict.fromkeys((*found.get(path, ()), *affects)))
    return found


def _walk(
    model: type[BaseModel], prefix: str, inherited: tuple[Affects, ...]
) -> Iterator[tuple[str, tuple[Affects, ...]]]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        own = tuple(declared(info)) or inherited
        yield path, own
        for inner in model_members(info.annotation):
            yield from _walk(inner, f"{path}.", own)


def effect_of(job: type[BaseModel], path: str) -> Effect:
    """Return what another value of the field at a dotted path changes, whatever its values.

    A path below the job's own fields, such as a key of a mapping, has the effect of the field that holds it.
    """
    effect = NOTHING
    for one in _affects(job, path):
        effect |= one.effect
    return effect


def may_change_on_resume(
    job: type[BaseModel], path: str, decisions: typing.Collection[str] = ("evaluation",)
) -> bool:
    """Tell whether a run may be resumed with another value of the field, whatever it is.

    Args:
        job: the model of the job.
        path: dotted path of a field or of a section, all of which is then meant.
        decisions: fields with `Effect.DECISIONS` on which a decision of the run depends, or their section.
    """
    known = fields_of(job)
    effect = effect_of(job, path) & ~(Effect.ROUNDING | Effect.LENGTH)
    if effect != Effect.DECISIONS:
        return not effect
    inside = any(p.startswith(f"{path}.") for p in known)
    return not inside and not any(path == d or path.startswith(f"{d}.") for d in decisions)


def names_content(job: type[BaseModel], path: str) -> bool:
    """Tell whether the field names files or a model."""
    return any(one.names_content for one in _affects(job, path))


def _affects(job: type[BaseModel], path: str) -> tuple[Affects, ...]:
    known = fields_of(job)
    while path not in known and "." in path:
        path = path.rpartition(".")[0]
    return known.get(path, ())


def changes_between(job: type[BaseModel], path: str, values: typing.Collection[Any]) -> Effect:
    """Return what the field changes between these values: all inside a section, and switches only where met."""
    effect = NOTHING
    known = fields_of(job)
    inside = [p for p in known if p.startswith(f"{path}.")]
    for one in _affects(job, path):
        if one.at is ... or one.at in values:
            effect |= one.effect
    for inner in inside:
        for one in known[inner]:
            effect |= one.effect
    return effect


def without(job: type[BaseModel], effect: Effect) -> dict[str, Any]:
    """Return the fields that lack an effect, as pydantic's `exclude` takes them: sections, and fields in them."""
    excluded: dict[str, Any] = {}
    for path, affects in fields_of(job).items():
        has = any(one.effect & effect for one in affects)
        section, _, name = path.partition(".")
        if not name and not has:
            excluded[section] = True
        elif name and "." not in name and not has and excluded.get(section) is not True:
            excluded.setdefault(section, set()).add(name)
    return excluded


def decided_by(job: BaseModel) -> dict[str, list[str]]:
    """Return field → the job's set fields that decide by it."""
    found: dict[str, list[str]] = {}
    for path, value, rule in _decisions(job, ""):
        for field in rule.fields:
            found.setdefault(field, []).append(f"{path} = {value}")
    return found


def _decisions(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, DecidedBy]]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        for rule in info.metadata:
            if (
                isinstance(rule, DecidedBy)
                and value is not None
                and getattr(section, rule.unless, None) is None
            ):
                yield f"{prefix}{name}", value, rule
        if isinstance(value, BaseModel):
            yield from _decisions(value, f"{prefix}{name}.")
