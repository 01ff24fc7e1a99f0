"""Tagging schemes: which entities tags spell, and how well predicted entities agree with true ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

OUTSIDE = "O"
PREFIXED = re.compile(r"([BIESLU])[-_](.+)", re.DOTALL)
Scheme = Literal["IOB", "IOBES", "BILOU", "IO", "words"]
"""`IOB`: IOB1 and IOB2, read as conlleval reads them. `IO`: entity names without a prefix. `words`: tags that
spell no entities, as parts of speech."""
ROLES = {
    "IOBES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
}
"""Scheme → prefix → begin, inside, end or single."""


class Entity(NamedTuple):
    """An entity of kind `kind` in words `start` to `stop` (exclusive)."""

    kind: str
    start: int
    stop: int


def scheme_of(labels: Sequence[str]) -> Scheme:
    """Return the scheme of a tag set.

    L and U belong to BILOU, E and S to IOBES, B and I to both and to IOB. Tags without prefixes are IO where
    one of them is `O`.
    """
    names = set(labels) - {OUTSIDE}
    matches = [PREFIXED.fullmatch(name) for name in names]
    prefixes = {match[1] for match in matches if match}
    if not names or (not prefixes & {"B", "I"} and not all(matches)):
        return "IO" if OUTSIDE in labels else "words"
    if prefixes & {"E", "S"}:
        return "IOBES"
    return "BILOU" if prefixes & {"L", "U"} else "IOB"


def entities_in(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """Return the entities that the tags of one text spell, in order; none under `words`.

    Under IOBES and BILOU an entity counts only where it is complete. Under IOB one begins at B, and at I after
    another kind or outside, as in conlleval.
    """
    if scheme == "words":
        return []
    if scheme in ROLES:
        return _complete(tags, ROLES[scheme])
    return _runs(tags, prefixed=scheme == "IOB")


def _split(tag: str, prefixed: bool = True) -> tuple[str, str]:
    """Return (prefix, kind) of a tag; a tag without a prefix is inside its kind."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = PREFIXED.fullmatch(tag) if prefixed else None
    return (match[1], match[2]) if match else ("I", tag)


def _runs(tags: Sequence[str], prefixed: bool) -> list[Entity]:
    out: list[Entity] = []
    start, current = 0, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = _split(tag, prefixed)
        if current and (kind != current or prefix == "B"):
            out.append(Entity(current, start, i))
            current = ""
        if kind and not current:
            start, current = i, kind
    return out


def _complete(tags: Sequence[str], roles: dict[str, str]) -> list[Entity]:
    out: list[Entity] = []
    start, current = 0, ""
    for i, tag in enumerate(tags):
        prefix, kind = _split(tag)
        role = roles.get(prefix, OUTSIDE)
        if role == "S":
            out.append(Entity(kind, i, i + 1))
        if role == "E" and kind == current:
            out.append(Entity(kind, start, i + 1))
        if role == "B":
            start, current = i, kind
        elif role != "I" or kind != current:
            current = ""
    return out


def entity_scores(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: Scheme
) -> dict[str, Any]:
    """Return precision, recall and F1 over whole entities: micro, F1's mean over kinds, and per kind."""
    right, found, wanted = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, predicted_tags in zip(true, predicted, strict=True):
        ours, theirs = set(entities_in(predicted_tags, scheme)), set(entities_in(true_tags, scheme))
        found.update(entity.kind for entity in ours)
        wanted.update(entity.kind for entity in theirs)
        right.update(entity.kind for entity in ours & theirs)
    kinds = sorted(found.keys() | wanted.keys())
    each = {kind: _scores(right[kind], found[kind], wanted[kind]) for kind in kinds}
    micro = _scores(right.total(), found.total(), wanted.total())
    names = ("precision", "recall", "f1")
    per_kind: dict[str, dict[str, float]] = {
        f"{name}_per_class": {kind: of[i] for kind, of in each.items()}
        for i, name in enumerate(names)
    }
    return {
        **dict(zip(names, micro, strict=True)),
        "f1_macro": sum(of[2] for of in each.values()) / max(len(each), 1),
        "entities": wanted.total(),
        **(per_kind if each else {}),
    }


def _scores(right: int, found: int, wanted: int) -> tuple[float, float, float]:
    """Return (precision, recall, F1) from counts; 0 where there is nothing to divide by."""
    return right / max(found, 1), right / max(wanted, 1), 2 * right / max(found + wanted, 1)
