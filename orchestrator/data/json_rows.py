"""Rows in JSON: a line per row, or one document that holds them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.errors import DataError
from orchestrator.tasks import BadRow

HEAD_BYTES = 2**20
"""What is read of a file to tell a document from lines."""
DOCUMENT_BYTES = 2**30
"""Largest document: it is read whole."""
CONTAINERS = ("data", "rows", "records", "examples", "items", "instances", "train")
"""Keys under which documents keep their rows."""
CONTAINER = re.compile(rf'\{{[^\[\]{{}}]*"({"|".join(CONTAINERS)})"\s*:\s*\[\s*[\[{{]')
SPACE = re.compile(r"[\s]*")


class KeysSeen:
    """A hook for `json` that notes the first duplicate key of an object."""

    def __init__(self) -> None:
        self.duplicate: str | None = None

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs) and self.duplicate is None:
            seen: set[str] = set()
            self.duplicate = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        return found


def parse_line(line: bytes) -> tuple[dict[str, Any] | BadRow, str | None]:
    """Return (row, first duplicate key of it) of a line."""
    hook = KeysSeen()
    try:
        row = json.loads(line, object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start} of the line"), None
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at character {error.pos + 1}"), None
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}"), None
    return (row if isinstance(row, dict) else BadRow("not a JSON object")), hook.duplicate


def is_document(head: bytes, whole: bool) -> bool:
    """Return whether a file that begins with `head` is one JSON document rather than a row per line.

    Args:
        head: the first bytes of the file.
        whole: they are all there are.
    """
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text[:1] not in ("[", "{"):
        return False
    first, _, others = text.partition("\n")
    if not others and not whole:  # a first line longer than the head
        return text[0] == "[" or CONTAINER.match(text) is not None
    more = others.strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # A broken line among lines, or a document over many lines
        return text[0] == "[" or not more or not others.lstrip("\r\n").startswith("{")
    if more:
        return False
    return isinstance(value, list) or any(_is_container(value, key) for key in CONTAINERS)


def _is_container(value: dict[str, Any], key: str) -> bool:
    rows = value.get(key)
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict | list)


def document_rows(
    content: bytes, url: str, columns: Sequence[str]
) -> Iterator[tuple[Any, str | None]]:
    """Yield (item, first duplicate key of it) of a document: an array, an object, or several objects.

    Raises DataError where it is not JSON, or holds columns instead of rows.
    """
    if len(content) > DOCUMENT_BYTES:
        raise DataError(
            f"{url}: one JSON document of more than {DOCUMENT_BYTES // 2**30} GiB. "
            "Write a row per line: jq -c '.[]' OLD.json > NEW.jsonl"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{url}, line {line}: invalid UTF-8") from error
    hook = KeysSeen()
    decoder = json.JSONDecoder(object_pairs_hook=hook)
    position, depth_of_array, finished = 0, 0, False
    while True:
        position = _after_space(text, position)
        if position == len(text):
            if depth_of_array:
                raise _broken(text, position, url, "the array is not closed")
            return
        character = text[position]
        if character == "[" and not depth_of_array and not finished:
            depth_of_array, position = 1, position + 1
        elif character == "]" and depth_of_array:
            depth_of_array, finished, position = 0, True, position + 1
        elif character == "," and depth_of_array:
            position += 1
        else:
            hook.duplicate = None
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                place = getattr(error, "pos", position)
                raise _broken(text, place, url, getattr(error, "msg", str(error))) from error
            items = [value] if depth_of_array else _rows_of(value, url, columns)
            for item in items:
                for row in _flat(item):
                    yield row, hook.duplicate


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _broken(text: str, position: int, url: str, why: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    return DataError(f"{url}, line {line}: not valid JSON: {why}")


def _rows_of(value: Any, url: str, columns: Sequence[str]) -> list[Any]:
    """Return the rows of a document's object."""
    if not isinstance(value, dict):
        return [value]
    names, rows = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(rows, list):  # pandas: orient="split"
        return [dict(zip(names, r, strict=False)) if isinstance(r, list) else r for r in rows]
    wanted = [value[c] for c in columns if c in value]
    if wanted and all(isinstance(column, dict) and "0" in column for column in wanted):
        raise DataError(
            f"{url}: holds columns, not rows. Write it with "
            'df.to_json("rows.jsonl", orient="records", lines=True)'
        )
    if wanted:
        return [value]
    found = [value[key] for key in CONTAINERS if _is_container(value, key)]
    if not found and len(value) == 1:
        found = [one for one in value.values() if isinstance(one, list)]
    return list(found[0]) if found else [value]


def _flat(item: Any) -> Iterator[Any]:
    """Yield an item, or the questions of a SQuAD article as `datasets` writes them."""
    if not (isinstance(item, dict) and isinstance(item.get("paragraphs"), list)):
        yield item
        return
    for paragraph in item["paragraphs"]:
        questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
        for asked in questions if isinstance(questions, list) else ():
            answers = [] if asked.get("is_impossible") else asked.get("answers") or []
            yield {
                "id": asked.get("id"),
                "title": item.get("title"),
                "context": paragraph.get("context"),
                "question": asked.get("question"),
                "answers": {
                    "text": [a.get("text") for a in answers],
                    "answer_start": [a.get("answer_start") for a in answers],
                },
            }
