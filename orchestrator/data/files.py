"""Input files: where they are, how they are compressed, what they hold, and a digest of their content."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

from orchestrator.data.json_rows import HEAD_BYTES, is_document
from orchestrator.data.retry import with_retries
from orchestrator.errors import DataError
from orchestrator.spec.paths import has_wildcards, is_hidden, local_files, no_such_file, plain_path

FULL_HASH_BYTES = 2**30
"""Files up to this size are identified by content; larger ones by size, time and both ends."""

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".text": "text",
}  # fmt: skip
CODECS = {
    ".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd",
    ".lz4": "lz4", ".br": "brotli", ".snappy": "snappy", ".sz": "snappy",
}  # fmt: skip
ARCHIVES = {
    ".zip": "unzip", ".tar": "tar xf", ".tgz": "tar xf", ".7z": "7z x", ".rar": "unrar x",
    ".Z": "uncompress",
}  # fmt: skip
"""Ending → the command that unpacks it."""
MAGIC = {
    "gzip": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18", "zip": b"PK\x03\x04", "Parquet": b"PAR1",
}  # fmt: skip
"""First bytes of compressed and binary files."""


@dataclass(frozen=True)
class SourceFile:
    """One input file. `digest` changes when its content does."""

    url: str
    format: str
    size_bytes: int
    digest: str
    delimiter: str = ""
    """Of CSV: what separates the fields."""

    @property
    def codec(self) -> str:
        """The compression that the name tells; empty where there is none."""
        return codec_of(self.url)


def codec_of(url: str) -> str:
    """Return the compression that a file's name tells; empty where there is none."""
    path = url.partition("?")[0] if "://" in url else url
    return CODECS.get(PurePosixPath(path).suffix.lower(), "")


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return (fsspec file system, path in it): local paths, pyarrow's URLs first, then fsspec's.

    Raises DataError for a scheme that is unknown, or whose package is missing.
    """
    import fsspec
    import pyarrow as pa
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs as pafs

    url = plain_path(url)
    if "://" not in url:
        return fsspec.filesystem("file"), url
    try:
        filesystem, path = pafs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: cannot be read here: {error}") from error
        return found
    return ArrowFSWrapper(filesystem), path


def find_files(
    paths: str | Sequence[str], file_format: str, delimiter: str | None = None
) -> list[SourceFile]:
    """Return every file the paths and globs name, in the order given, globs sorted.

    Raises DataError where a path matches nothing or its format cannot be told.
    """
    urls = [paths] if isinstance(paths, str) else paths
    find = partial(_find, file_format=file_format, delimiter=delimiter)
    return [file for url in urls for file in with_retries(url, partial(find, url))]


def _find(url: str, file_format: str, delimiter: str | None) -> list[SourceFile]:
    url = plain_path(url)
    filesystem, path = open_filesystem(url)
    if "://" not in url:
        files = local_files(path)
        if not files:
            why, fix = no_such_file(path)
            raise DataError(f"{url}: {why}. {fix} (globs like data/*.parquet work).")
    else:
        names = [path]
        if has_wildcards(path) and not _is_file(filesystem, path):
            root = path[: min(path.find(c) for c in "*?[" if c in path)].rpartition("/")[0]
            names = sorted(n for n in filesystem.glob(path) if not is_hidden(n, root))
        files = [n for n in names if _is_file(filesystem, n)]
        if not files:
            raise DataError(
                f"{url}: no such file. Check the path (globs like data/*.parquet work)."
            )
    return [
        _describe(filesystem, name, _url_of(name, url), file_format, delimiter) for name in files
    ]


def _is_file(filesystem: Any, path: str) -> bool:
    """Unlike fsspec's own `isfile`, do not take every error for a no: an endpoint may be down."""
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


def _describe(
    filesystem: Any, path: str, url: str, file_format: str, delimiter: str | None
) -> SourceFile:
    suffixes = PurePosixPath(path).suffixes
    commands = [ARCHIVES.get(s) or ARCHIVES.get(s.lower()) for s in suffixes[-2:]]
    if command := next(filter(None, commands), None):
        raise DataError(f"{url}: is an archive. Unpack it first: {command} {path}")
    suffixes = [s for s in suffixes if s.lower() not in CODECS]
    last = suffixes[-1].lower() if suffixes else ""
    if file_format == "auto":
        file_format = FORMATS.get(last, "")
        if not file_format:
            raise DataError(
                f"{url}: its format cannot be told from its name. "
                "Set data.format to parquet, jsonl, csv or text."
            )
    size = int(filesystem.size(path))
    digest = hashlib.sha256()
    with filesystem.open(path, "rb") as handle:
        head = handle.read(8)
        handle.seek(0)
        if size <= FULL_HASH_BYTES:
            while chunk := handle.read(2**22):
                digest.update(chunk)
        else:
            digest.update(f"{size} {filesystem.modified(path)}".encode())
            digest.update(handle.read(2**20))
            handle.seek(size - 2**20)
            digest.update(handle.read(2**20))
    _check_content(url, file_format, head)
    separator = (delimiter or ("\t" if last == ".tsv" else ",")) if file_format == "csv" else ""
    file = SourceFile(url, file_format, size, digest.hexdigest(), separator)
    if file_format == "parquet":
        return file
    return _with_layout(file)


def _check_content(url: str, file_format: str, head: bytes) -> None:
    """Raise DataError where a file's first bytes are not what its name says."""
    codec = codec_of(url)
    found = next((name for name, magic in MAGIC.items() if head.startswith(magic)), "")
    if codec in MAGIC and found != codec and file_format != "parquet":
        ending = f".{url.rpartition('.')[2]}"
        is_ = f"it is {found}" if found else "it looks uncompressed" if head else "it is empty"
        raise DataError(
            f"{url}: its name says {codec}, but its content does not: {is_}. "
            f"Rename it without {ending}, or compress it with {codec}."
        )
    if not codec and found and file_format != "parquet":
        raise DataError(
            f"{url}: is a {found} file, not {file_format}. Give it the ending of {found}, "
            "or unpack it."
        )


def _with_layout(file: SourceFile) -> SourceFile:
    """Return the file, as `json` where it holds one JSON document instead of a line per row."""
    try:
        with open_bytes(file) as handle:
            head = handle.read(HEAD_BYTES)
    except UNREADABLE as error:
        raise unreadable(file, error) from error
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (
        len(head) > 3 and head[1::2].count(0) > len(head) // 4
    ):
        raise DataError(
            f"{file.url}: is UTF-16 text. Convert it to UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW"
        )
    if file.format == "jsonl" and is_document(head, len(head) < HEAD_BYTES):
        return SourceFile(file.url, "json", file.size_bytes, file.digest)
    return file


UNREADABLE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
"""What reading a damaged file raises: EOFError stands for a compressed one that was cut off."""
FULL_NAMES = {"zstd": "Zstandard (zstd)", "gzip": "gzip", "lz4": "LZ4", "brotli": "Brotli"}


def unreadable(file: SourceFile, error: Exception) -> DataError:
    """Return the error for a file that cannot be read."""
    if file.codec:
        name = FULL_NAMES.get(file.codec, file.codec)
        return DataError(
            f"{file.url}: cannot be unpacked: it is cut off, or is not {name} data ({error}). "
            "Copy or compress it again."
        )
    return DataError(f"{file.url}: cannot be read as {file.format}: {error}")


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked.

    Raises DataError for a compression that needs a package which is not installed.
    """
    filesystem, path = open_filesystem(file.url)
    with filesystem.open(path, "rb") as handle:
        stream = _unpacked(file, handle)
        try:
            yield stream
        finally:
            if stream is not handle:
                stream.close()


def _unpacked(file: SourceFile, handle: Any) -> Any:
    """Return a stream of the content behind a compressed one."""
    import pyarrow as pa

    match file.codec:
        case "":
            return handle
        case "gzip":
            return gzip.GzipFile(fileobj=handle)
        case "bz2":
            return bz2.BZ2File(handle)
        case "xz":
            return lzma.LZMAFile(handle)
        case "snappy":
            raise DataError(
                f"{file.url}: snappy is not supported. Unpack it first: "
                "pip install python-snappy, then python -m snappy -d OLD NEW"
            )
        case codec:
            compressed = pa.CompressedInputStream(pa.PythonFile(handle, "r"), codec)
            return io.BufferedReader(compressed)
