"""Labels as data files hold them: which values are labels, their names, and their numbers."""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import numbers
import re
import tokenize
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from orchestrator.errors import Problem
from orchestrator.tasks.base import BadRow

INTEGER = re.compile(r"[+-]?\d+")
WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")
"""How pandas writes a column of integers with gaps."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
NUMPY_NUMBERS = re.compile(r"[\s\d.+-]+")
SHOWN_CHARACTERS = 80


def shown(value: Any) -> str:
    """Return a value for a message: quoted, control characters escaped, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def printable(text: str) -> str:
    """Return `text` with its control and other invisible characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_missing(value: Any) -> bool:
    """Return whether a value is null, empty or NaN, also NaN as pandas writes it into text files."""
    if value is None or (isinstance(value, str) and (not value.strip() or value.lower() == "nan")):
        return True
    return isinstance(value, float | Decimal) and math.isnan(value)


def label_name(value: Any) -> str | BadRow:
    """Return the name of the label that a value is: texts as they are, `1.0` as `1`.

    Lists, objects, timestamps and bytes are no labels.
    """
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, float | Decimal | numbers.Real):
        if not math.isfinite(value):
            return BadRow(f"is {value}, which is no label")
        whole = math.floor(value)
        return str(whole) if value == whole else str(value)
    kind = {"dict": "an object", "list": "a list", "tuple": "a list"}.get(type(value).__name__)
    return BadRow(
        f"must be a text, an integer or a boolean, got {kind or f'a {type(value).__name__}'}: {shown(value)}"
    )


def label_number(
    value: Any, index: Mapping[str, int], given: bool = False, what: str = "label"
) -> int | BadRow:
    """Return the output that a label stands for.

    Args:
        value: the label as a row holds it.
        index: label → output.
        given: the job lists the labels, so that an integer that is not one of them counts from 0 through
            the list.
        what: the word for a label in messages.
    """
    name = label_name(value)
    if isinstance(name, BadRow):
        return name
    if name in index:
        return index[name]
    whole = WHOLE_FLOAT.fullmatch(name)
    if whole:
        name = str(int(whole[1]))
        if name in index:
            return index[name]
    position = _position(value if isinstance(value, bool) else name, index)
    if given and position is not None:
        if 0 <= position < len(index):
            return position
        return BadRow(
            f"{what} {name} is beyond the {len(index)} of task.labels, which are counted from 0"
        )
    return BadRow(f"unknown {what} {shown(value)}; {_known(name, index)}")


def _position(value: str | bool, index: Mapping[str, int]) -> int | None:
    """Return the integer that a value is, where the names of `index` are no integers themselves."""
    if any(INTEGER.fullmatch(name) for name in index):
        return None
    if isinstance(value, bool):
        return int(value) if len(index) == 2 else None
    return int(value) if INTEGER.fullmatch(value) and len(value) < 10 else None


def _known(name: str, index: Mapping[str, int]) -> str:
    near = {_folded(label): label for label in index}
    close = near.get(_folded(name)) or next(
        iter(difflib.get_close_matches(name, list(index)[:5000], n=1)), None
    )
    listed = ", ".join(shown(label) for label in list(index)[:10])
    more = f" and {len(index) - 10} more" if len(index) > 10 else ""
    nearest = f"the nearest is {shown(close)}; " if close is not None else ""
    return f"{nearest}the job knows: {listed}{more}"


def list_in(value: Any) -> list[Any] | None:
    """Return the list that a value is, also one written as text (JSON, Python, numpy); None for others."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if len(text) < 2 or (text[0], text[-1]) not in (("[", "]"), ("(", ")"), ("{", "}")):
        return None
    if text[0] == "[":
        try:
            found = json.loads(text)
            return found if isinstance(found, list) else None
        except (ValueError, RecursionError):
            pass
        if NUMPY_NUMBERS.fullmatch(text[1:-1]) and "," not in text:
            return [json.loads(n) if INTEGER.fullmatch(n) else float(n) for n in _numbers(text)]
    return _python_list(text)


def _numbers(text: str) -> list[str]:
    parts = text[1:-1].split()
    return [p for p in parts if NUMBER.fullmatch(p)] if all(map(NUMBER.fullmatch, parts)) else []


def _python_list(text: str) -> list[Any] | None:
    """Return the items of a Python list, tuple or set; numpy's has no commas between its texts."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    if not isinstance(found, list | tuple | set):
        return None
    items = sorted(found, key=str) if isinstance(found, set) else list(found)
    if not all(isinstance(item, str) for item in items):
        return items
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        texts = [token.string for token in tokens if token.type == tokenize.STRING]
    except (tokenize.TokenError, SyntaxError):
        return items
    # Without commas Python reads two neighboring texts as one.
    return [ast.literal_eval(one) for one in texts] if len(texts) > len(items) else items


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels in order: numbers by value where all are numbers, else by their characters.

    Where all are integers, some written `1.0`, those are written as integers.
    """
    names = set(labels)
    if names and all(INTEGER.fullmatch(n) or WHOLE_FLOAT.fullmatch(n) for n in names):
        if any(WHOLE_FLOAT.fullmatch(n) for n in names):
            names = {str(int(float(n))) for n in names}
        return tuple(sorted(names, key=lambda n: (int(n), n)))
    if names and all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=lambda n: (float(n), n)))
    return tuple(sorted(names))


def look_like_measurements(labels: Sequence[str]) -> bool:
    """Return whether distinct labels look like values of a continuous quantity: many, with fractions."""
    if len(labels) <= 20 or not all(map(NUMBER.fullmatch, labels)):
        return False
    return any(not INTEGER.fullmatch(n) and not WHOLE_FLOAT.fullmatch(n) for n in labels)


def label_warnings(labels: Sequence[str]) -> list[str]:
    """Return warnings on labels that differ only in case, surrounding space or Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_folded(label), []).append(label)
    out = [
        f"labels {', '.join(map(shown, same))} differ only in {_difference(same)}, and are {len(same)} classes"
        for same in groups.values()
        if len(same) > 1
    ]
    odd = [label for label in labels if not label.isprintable()]
    if odd:
        out.append(f"label {shown(odd[0])} holds a control or invisible character")
    return out


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _difference(labels: Sequence[str]) -> str:
    if len({" ".join(label.split()) for label in labels}) == 1:
        return "space"
    if len({unicodedata.normalize("NFKC", label) for label in labels}) == 1:
        return "Unicode form"
    return "case" if len({label.casefold() for label in labels}) == 1 else "case, space or form"


def label_problems(labels: tuple[str, ...] | None) -> Iterator[Problem]:
    """Yield the problems of a label set that the job gives."""
    if labels is None:
        return
    if len(set(labels)) != len(labels):
        yield Problem("task.labels", "holds a label twice", "list each once", labels)
    if len(labels) < 2:
        yield Problem("task.labels", "needs at least two labels", "", labels)


def per_label(
    labels: Sequence[str], precision: Iterable[Any], recall: Iterable[Any], f1: Iterable[Any]
) -> dict[str, dict[str, float]]:
    """Scores of each label as metrics of their own, in the names the report draws."""
    scores = {"precision": precision, "recall": recall, "f1": f1}
    return {
        f"{name}_per_class": {k: float(v) for k, v in zip(labels, values, strict=True)}
        for name, values in scores.items()
    }
