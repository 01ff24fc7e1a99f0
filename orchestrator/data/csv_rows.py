"""Rows in CSV and TSV: quotes that never close are an error, and swallowed rows are noticed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import IO, Any

from orchestrator.data.files import SourceFile, open_bytes
from orchestrator.errors import DataError
from orchestrator.tasks import BadRow

NEWLINE_SNIFF_BYTES = 2**16
Note = Callable[[str, str], None]
"""Takes a kind of warning, and an example of it."""


def csv_rows(file: SourceFile, note: Note) -> Iterator[list[str] | BadRow]:
    """Yield the header, then each record as its fields, or as a BadRow where quotes are wrong in one line.

    Raises DataError that names the line of a quote which never closes.
    """
    csv.field_size_limit(2**31 - 1)
    newline = _newline(file)
    quoted = file.delimiter != "\t" or _tabs_are_quoted(file, newline)
    with open_bytes(file) as raw:
        reader = _reader(raw, file, newline, quoted)
        width = 0
        while True:
            before = reader.line_num
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _wrong_quotes(file, before + 1, reader.line_num, error)
                continue
            if not values:
                continue
            if not width:
                width = len(values)
            if reader.line_num > before + 1 and _swallowed(values, file.delimiter, width):
                lines = f"{file.url}, lines {before + 1} to {reader.line_num}"
                note("a quoted field holds lines that look like rows of their own", lines)
            yield values


def _newline(file: SourceFile) -> str:
    """Return what ends a line, for `io`: the line feed, or any end where the file has carriage returns only."""
    with open_bytes(file) as raw:
        head = raw.read(NEWLINE_SNIFF_BYTES)
    return "" if b"\r" in head and b"\n" not in head else "\n"


def _reader(raw: IO[bytes], file: SourceFile, newline: str, quoted: bool) -> Any:
    text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline=newline)
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(text, delimiter=file.delimiter, quoting=quoting, strict=True)


def _wrong_quotes(file: SourceFile, first: int, last: int, error: csv.Error) -> BadRow:
    why = str(error)
    if "unexpected end" in why:
        line = _open_quote(file, first)
        raise DataError(
            f"{file.url}, line {line}: a quote opens here and never closes. "
            'Close it, or double it ("") where it is part of the text.'
        )
    if last > first:
        raise DataError(
            f"{file.url}, line {first}: a quote opens here, and line {last} goes on after it closes. "
            'Close it on its own line, or double quotes ("") that are part of the text.'
        )
    if "new-line" in why:
        return BadRow("holds a carriage return outside quotes")
    return BadRow('holds a quote inside a quoted field that is not doubled ("")')


def _open_quote(file: SourceFile, first: int) -> int:
    """Return the line of the last quote that opens at or after the record on line `first`."""
    line, opened, inside, at_start = 0, first, False, True
    with open_bytes(file) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="\n")
        for line, content in enumerate(text, start=1):
            if line < first:
                continue
            position = 0
            while position < len(content):
                character = content[position]
                if inside and character == '"':
                    if content[position + 1 : position + 2] == '"':
                        position += 1
                    else:
                        inside = False
                elif not inside and at_start and character == '"':
                    inside, opened = True, line
                at_start = not inside and character in (file.delimiter, "\n")
                position += 1
    return opened


def _swallowed(values: list[str], delimiter: str, width: int) -> bool:
    """Return whether most lines inside a field have as many fields as the header."""
    if width < 2:
        return False
    for value in values:
        lines = [line for line in value.split("\n")[1:] if line.strip()]
        alike = sum(line.count(delimiter) == width - 1 for line in lines)
        if alike and 2 * alike >= len(lines):
            return True
    return False


def _tabs_are_quoted(file: SourceFile, newline: str) -> bool:
    """Return whether quotes of a tab-separated file enclose fields, or are part of the text.

    They enclose fields where all of them close, enclose no tab together with a line break, and reading them
    so leaves no more ragged rows than taking them as text.
    """
    counts = []
    for quoted in (False, True):
        with open_bytes(file) as raw:
            reader = _reader(raw, file, newline, quoted)
            width, ragged, any_quote = 0, 0, False
            try:
                for values in reader:
                    width = width or len(values)
                    ragged += bool(values) and len(values) != width
                    any_quote = any_quote or any(v[:1] == '"' for v in values)
                    if quoted and any("\t" in v and "\n" in v for v in values):
                        return False
            except csv.Error:
                return False
            if not quoted and not any_quote:
                return False
            counts.append(ragged)
    return counts[1] <= counts[0]
