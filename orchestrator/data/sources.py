"""Raw input: which files there are, how they split into pieces, and the rows of one piece."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from orchestrator.data.patience import patiently
from orchestrator.errors import DataError
from orchestrator.tasks import BadRow

PIECE_BYTES = 64 * 2**20
"""Text-like files are cut at line ends into pieces of about this size; each is one task."""
FULL_HASH_BYTES = 2**30
"""Files up to this size are identified by content; larger ones by size, time and both ends."""

UNREADABLE = (OSError, EOFError, ValueError, csv.Error, zlib.error)
"""What reading a damaged file raises: EOFError stands for a compressed one that was cut off."""

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".text": "text",
}  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """One input file. `digest` changes when its content does."""

    url: str
    format: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Piece:
    """A part of one file that one task reads.

    `start` and `stop` are bytes (jsonl, text), row groups (parquet), or 0 and 0 (csv: the whole file).
    """

    index: int
    file_index: int
    file: SourceFile
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class RawItem:
    """A row, where it stands (1-based line or record), and a key that is unique in its file."""

    row: dict[str, Any] | BadRow
    number: int
    key: int


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it): local paths, pyarrow's URLs first, then fsspec's."""
    import fsspec
    import pyarrow as pa
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs as pafs

    if "://" not in url:
        return fsspec.filesystem("file"), url
    try:
        filesystem, path = pafs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    return ArrowFSWrapper(filesystem), path


def find_files(paths: str | Sequence[str], file_format: str) -> list[SourceFile]:
    """Every file the paths and globs name, in the order given, globs sorted.

    Raises DataError where a path matches nothing or its format cannot be told.
    """
    urls = [paths] if isinstance(paths, str) else paths
    return [file for url in urls for file in patiently(url, partial(_find, url, file_format))]


def _find(url: str, file_format: str) -> list[SourceFile]:
    filesystem, path = open_filesystem(url)
    names = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
    files = [n for n in names if _is_file(filesystem, n)]
    if not files:
        raise DataError(f"{url}: no such file. Check the path (globs like data/*.parquet work).")
    return [_describe(filesystem, name, _url_of(name, url), file_format) for name in files]


def _is_file(filesystem: Any, path: str) -> bool:
    """fsspec's own `isfile` takes every error for a no, also that of an endpoint that is down."""
    try:
        return bool(filesystem.info(path)["type"] == "file")
    except FileNotFoundError:
        return False


def _url_of(name: str, asked: str) -> str:
    """A file's URL: the scheme that was asked for, and what follows the path (an endpoint, a region)."""
    if "://" not in asked or "://" in name:
        return name
    scheme, _, rest = asked.partition("://")
    mark, options = rest.rpartition("?")[1:] if "=" in rest else ("", "")
    return f"{scheme}://{name}{mark}{options}"


def _describe(filesystem: Any, path: str, url: str, file_format: str) -> SourceFile:
    if file_format == "auto":
        suffixes = [
            s for s in PurePosixPath(path).suffixes if s not in (".gz", ".zst", ".bz2", ".xz")
        ]
        file_format = FORMATS.get(suffixes[-1] if suffixes else "", "")
        if not file_format:
            raise DataError(
                f"{url}: its format cannot be told from its name. "
                "Set data.format to parquet, jsonl, csv or text."
            )
    size = int(filesystem.size(path))
    digest = hashlib.sha256()
    with filesystem.open(path, "rb") as handle:
        if size <= FULL_HASH_BYTES:
            while chunk := handle.read(2**22):
                digest.update(chunk)
        else:
            digest.update(f"{size} {filesystem.modified(path)}".encode())
            digest.update(handle.read(2**20))
            handle.seek(size - 2**20)
            digest.update(handle.read(2**20))
    return SourceFile(url, file_format, size, digest.hexdigest())


def split_into_pieces(files: Sequence[SourceFile]) -> list[Piece]:
    """Cut the files so that each piece is one task's work."""
    pieces: list[Piece] = []
    for i, file in enumerate(files):
        try:
            ranges = patiently(file.url, partial(_ranges, file))
        except UNREADABLE as error:
            raise _unreadable(file, error) from error
        for start, stop in ranges:
            pieces.append(Piece(len(pieces), i, file, start, stop))
    return pieces


def _ranges(file: SourceFile) -> list[tuple[int, int]]:
    compressed = file.url.partition("?")[0].endswith((".gz", ".zst", ".bz2", ".xz"))
    match file.format:
        case "parquet":
            import pyarrow.parquet as pq

            filesystem, path = open_filesystem(file.url)
            with filesystem.open(path, "rb") as handle:
                metadata = pq.ParquetFile(handle).metadata
                sizes = [
                    metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
                ]
            return _group(sizes)
        case "jsonl" | "text" if not compressed:
            edges = [*range(0, file.size_bytes, PIECE_BYTES), file.size_bytes]
            return list(pairwise(edges)) or [(0, 0)]
        case _:
            return [(0, 0)]


def _group(sizes: list[int]) -> list[tuple[int, int]]:
    """Consecutive row groups, joined up to PIECE_BYTES."""
    out: list[tuple[int, int]] = []
    start, held = 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= PIECE_BYTES or i == len(sizes) - 1:
            out.append((start, i + 1))
            start, held = i + 1, 0
    return out


def read_piece(piece: Piece, columns: Sequence[str]) -> Iterator[RawItem]:
    """The rows of a piece, unusable ones as BadRow.

    Raises DataError where the file as a whole cannot be read or lacks a column.
    """
    try:
        match piece.file.format:
            case "parquet":
                yield from _read_parquet(piece, columns)
            case "csv":
                yield from _read_csv(piece, columns)
            case "jsonl":
                for number, key, line in _lines(piece):
                    yield RawItem(_parse_json(line), number, key)
            case _:
                for number, key, line in _lines(piece):
                    yield RawItem(_decode(line, columns[0]), number, key)
    except UNREADABLE as error:
        raise _unreadable(piece.file, error) from error


def _unreadable(file: SourceFile, error: Exception) -> DataError:
    return DataError(f"{file.url}: cannot be read as {file.format}: {error}")


def line_number_at(file: SourceFile, offset: int) -> int:
    """How many lines begin before byte `offset` > 0, so that the next one is number 1 of a piece that
    starts there; only error messages need it."""
    filesystem, path = open_filesystem(file.url)
    with filesystem.open(path, "rb") as handle:
        lines, offset = 1, offset - 1
        while offset > 0 and (chunk := handle.read(min(offset, 2**22))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _open_text(piece: Piece) -> Any:
    filesystem, path = open_filesystem(piece.file.url)
    return filesystem.open(path, "rb", compression="infer")


def _lines(piece: Piece) -> Iterator[tuple[int, int, bytes]]:
    """(line number within the piece, byte offset, line) of lines that start inside the piece.

    Blank lines separate; they are no rows.
    """
    with _open_text(piece) as handle:
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


def _parse_json(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start} of the line")
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def _decode(line: bytes, column: str) -> dict[str, Any] | BadRow:
    try:
        return {column: line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start} of the line")


def _read_csv(piece: Piece, columns: Sequence[str]) -> Iterator[RawItem]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in piece.file.url else ","
    with _open_text(piece) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter)
        header = next(reader, [])
        _require(piece.file, columns, header)
        for number, values in enumerate(reader, start=1):
            if values:
                yield RawItem(_csv_row(header, values), number, number)


def _csv_row(header: list[str], values: list[str]) -> dict[str, Any] | BadRow:
    if len(values) != len(header):
        return BadRow(f"has {len(values)} fields where the header has {len(header)}")
    if any("\udc80" <= ch <= "\udcff" for value in values if not value.isascii() for ch in value):
        return BadRow("invalid UTF-8")
    return dict(zip(header, values, strict=True))


def _read_parquet(piece: Piece, columns: Sequence[str]) -> Iterator[RawItem]:
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
        for batch in file.iter_batches(batch_size=4096, row_groups=wanted, columns=list(columns)):
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
    missing = [c for c in columns if c not in present]
    if missing:
        raise DataError(
            f"{file.url}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, present))}. "
            "Name the right ones under `task:`."
        )
