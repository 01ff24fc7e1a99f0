"""The rows of one piece of a file."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.csv_rows import csv_rows
from orchestrator.data.files import UNREADABLE, SourceFile, open_bytes, open_filesystem, unreadable
from orchestrator.data.json_rows import document_rows, parse_line
from orchestrator.data.sources import Piece
from orchestrator.errors import DataError
from orchestrator.tasks import BadRow


@dataclass(frozen=True)
class RawItem:
    """A row, where it stands (1-based line or record), and a key that is unique in its file."""

    row: dict[str, Any] | BadRow
    number: int
    key: int


@dataclass
class Notes:
    """Warnings about files that can be read: kind of warning → count and an example."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count a warning; the first example is kept."""
        before, first = self.found.get(kind, (0, example))
        self.found[kind] = (before + count, first)

    def lines(self) -> list[str]:
        """Return a sentence per kind."""
        return [
            f"{kind}: {example}" + (f" and {count - 1:,} more" if count > 1 else "")
            for kind, (count, example) in self.found.items()
        ]


def read_piece(
    piece: Piece,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    notes: Notes | None = None,
    names: dict[str, tuple[str, ...]] | None = None,
) -> Iterator[RawItem]:
    """Yield the rows of a piece, unusable ones as BadRow.

    Args:
        piece: what to read.
        columns: the columns that rows need.
        optional: columns that are read where there are any.
        notes: takes warnings.
        names: column → class names; integers in these columns are replaced by the names they stand for.

    Raises DataError where the file as a whole cannot be read or lacks a column.
    """
    notes = notes if notes is not None else Notes()
    try:
        match piece.file.format:
            case "parquet":
                items = _read_parquet(piece, columns, optional)
            case "csv":
                items = _read_csv(piece, columns, notes)
            case "json":
                items = _read_document(piece, columns, notes)
            case "jsonl":
                items = _read_lines(piece, notes)
            case _:
                items = (
                    RawItem(_decode(line, columns[0], offset), number, offset)
                    for number, offset, line in _lines(piece)
                )
        for item in items:
            if names and isinstance(item.row, dict):
                for column, known in names.items():
                    item.row[column] = _named(item.row.get(column), known)
            yield item
    except (*UNREADABLE, csv.Error) as error:
        raise unreadable(piece.file, error) from error


def class_names(file: SourceFile, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the class names that a Parquet file's `datasets` metadata gives for columns."""
    if file.format != "parquet":
        return {}
    import pyarrow.parquet as pq

    filesystem, path = open_filesystem(file.url)
    with filesystem.open(path, "rb") as handle:
        metadata = pq.read_schema(handle).metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: _names_in(features.get(column)) for column in columns}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {column: tuple(names) for column, names in found.items() if names}


def _names_in(feature: Any) -> list[str]:
    """Return the names of a ClassLabel feature, also inside a sequence."""
    if isinstance(feature, list):
        return _names_in(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        return [str(name) for name in names]
    return _names_in(feature.get("feature"))


def _named(value: Any, names: Sequence[str]) -> Any:
    """Return the name that an integer stands for; -1 is the missing label of `datasets`."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return value
    if value == -1:
        return None
    return names[int(value)] if 0 <= value < len(names) else value


def line_number_at(file: SourceFile, offset: int) -> int:
    """Return how many lines begin before byte `offset` > 0, so that the next one is number 1 of a piece that
    starts there; only error messages need it."""
    filesystem, path = open_filesystem(file.url)
    with filesystem.open(path, "rb") as handle:
        lines, offset = 1, offset - 1
        while offset > 0 and (chunk := handle.read(min(offset, 2**22))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _lines(piece: Piece) -> Iterator[tuple[int, int, bytes]]:
    """(line number within the piece, byte offset, line) of lines that start inside the piece.

    Blank lines separate; they are no rows.
    """
    with open_bytes(piece.file) as handle:
        stop = piece.stop or None
        offset = piece.start
        if offset:
            handle.seek(offset - 1)
            offset += len(handle.readline()) - 1
        number = 0
        while stop is None or offset < stop:
            line = handle.readline()
            if not line:
                return
            number += 1
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _read_lines(piece: Piece, notes: Notes) -> Iterator[RawItem]:
    for number, offset, line in _lines(piece):
        row, duplicate = parse_line(line)
        if duplicate is not None:
            _note_duplicate(notes, piece, number if not piece.start else None, duplicate)
        yield RawItem(row, number, offset)


def _read_document(piece: Piece, columns: Sequence[str], notes: Notes) -> Iterator[RawItem]:
    with open_bytes(piece.file) as handle:
        content = handle.read()
    rows = document_rows(content, piece.file.url, columns)
    for number, (item, duplicate) in enumerate(rows, start=1):
        if duplicate is not None:
            _note_duplicate(notes, piece, number, duplicate)
        yield RawItem(
            item if isinstance(item, dict) else BadRow("not a JSON object"), number, number
        )


def _note_duplicate(notes: Notes, piece: Piece, number: int | None, key: str) -> None:
    place = f", row {number}" if number else ""
    notes.add(
        "duplicate key in a JSON object; its last value counts",
        f"{piece.file.url}{place}, key {key!r}",
    )


def _decode(line: bytes, column: str, offset: int) -> dict[str, Any] | BadRow:
    try:
        text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start} of the line")
    return {column: text.rstrip("\r\n")}


def _read_csv(piece: Piece, columns: Sequence[str], notes: Notes) -> Iterator[RawItem]:
    rows = csv_rows(piece.file, notes.add)
    header = next(rows, [])
    if isinstance(header, BadRow):
        raise DataError(f"{piece.file.url}, line 1: the header {header.why}")
    _require(piece.file, columns, header)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        notes.add("duplicate columns in the header", f"{piece.file.url}, {', '.join(twice)}")
    for number, values in enumerate(rows, start=1):
        row = values if isinstance(values, BadRow) else _csv_row(header, values)
        yield RawItem(row, number, number)


def _csv_row(header: list[str], values: list[str]) -> dict[str, Any] | BadRow:
    if len(values) != len(header):
        return BadRow(f"has {len(values)} fields where the header has {len(header)}")
    if any("\udc80" <= ch <= "\udcff" for value in values if not value.isascii() for ch in value):
        return BadRow("invalid UTF-8")
    return dict(zip(header, values, strict=True))


def _read_parquet(
    piece: Piece, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[RawItem]:
    import pyarrow.parquet as pq

    filesystem, path = open_filesystem(piece.file.url)
    with filesystem.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        _require(piece.file, columns, file.schema_arrow.names)
        groups = range(file.metadata.num_row_groups)
        number = sum(file.metadata.row_group(i).num_rows for i in groups[: piece.start])
        wanted = list(groups[piece.start : piece.stop])
        if not wanted:
            return
        read = [*columns, *(c for c in optional if c in file.schema_arrow.names)]
        for batch in file.iter_batches(batch_size=4096, row_groups=wanted, columns=read):
            for i in range(batch.num_rows):
                number += 1
                try:
                    row: dict[str, Any] | BadRow = {
                        name: batch.column(k)[i].as_py()
                        for k, name in enumerate(batch.schema.names)
                    }
                except UnicodeDecodeError:
                    row = BadRow("invalid UTF-8")
                yield RawItem(row, number, number)


def _require(file: SourceFile, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise DataError where a column is missing or duplicated."""
    twice = [c for c in columns if list(present).count(c) > 1]
    if twice:
        raise DataError(
            f"{file.url}: duplicate column {twice[0]!r}, {list(present).count(twice[0])} times in the header. "
            "Rename or drop the others."
        )
    missing = [c for c in columns if c not in present]
    if not missing:
        return
    if not present:
        raise DataError(f"{file.url}: is empty: it has no header.")
    if len(present) == 1 and file.delimiter:
        other = next((d for d in (";", "\t", "|", ",") if d in present[0]), None)
        if other:
            raise DataError(
                f"{file.url}: the header has one column, {present[0]!r}. "
                f"Its fields seem to be separated by {other!r}: set data.delimiter={json.dumps(other)}"
            )
    close = difflib.get_close_matches(missing[0], present, n=1)
    near = f"Did you mean {close[0]!r}? " if close else ""
    raise DataError(
        f"{file.url}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, present))}. "
        f"{near}Name the right ones under `task:`."
    )
