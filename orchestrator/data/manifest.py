"""Manifest of prepared data: shards, counts, checksums, and the fingerprint they were made under."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field, ValidationError

from orchestrator.errors import DataError
from orchestrator.run_folder import damaged, read_object
from orchestrator.values import Frozen

FORMAT_VERSION = 3
"""Raised when prepared shards of an older version must not be read."""
BATCH_ROWS = 1024
"""Rows per Arrow record batch of prepared rows: what one random read touches."""


class Shard(Frozen):
    """One Arrow IPC file."""

    file: str
    rows: int
    size_bytes: int
    sha256: str


class BadRowRecord(Frozen):
    """An input row that was left out."""

    file: str
    row: int
    why: str


class Manifest(Frozen):
    """A prepared data set. Where the file exists, the set is complete."""

    version: int = FORMAT_VERSION
    fingerprint: str
    inputs: tuple[str, ...]
    features: dict[str, str]
    labels: tuple[str, ...]
    max_length_tokens: int
    longest_tokens: int
    longest_target_tokens: int = 0
    """Of what a decoder reads; 0 where there is none."""
    rows: int
    tokens: int
    target_tokens: int
    input_rows: int
    truncated_rows: int
    bad_rows: int
    bad_row_examples: tuple[BadRowRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    """What is odd about the input, though it can be used."""
    notes: dict[str, int] = Field(default_factory=dict)
    """Remarks on rows that were used all the same, and the number of rows that each concerns."""
    shards: tuple[Shard, ...]
    batch_rows: int = BATCH_ROWS
    """Rows of each shard's record batches but its last."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def mean_tokens(self) -> float:
        """Tokens per prepared row."""
        return self.tokens / max(self.rows, 1)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where there is none or it is of another version."""
    data = read_object(folder / "manifest.json")
    if data is None or data.get("version") != FORMAT_VERSION:
        return None
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(folder / "manifest.json", f"{where}: {first['msg']}") from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


HASHED_BYTES = 4 * 2**30
"""Shards are compared with their checksums up to this many bytes in all: some seconds of a start."""


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Compare every shard with the manifest: its size, and its checksum within the first HASHED_BYTES.

    Raises DataError naming the first that differs.
    """
    hashed_bytes = 0
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.exists():
            raise DataError(
                f"{path}: this shard is missing. Delete {folder} and run prepare again."
            )
        hashed_bytes += shard.size_bytes
        same = path.stat().st_size == shard.size_bytes
        if not same or (hashed_bytes <= HASHED_BYTES and sha256_of(path) != shard.sha256):
            raise DataError(
                f"{path}: its content does not match the manifest's checksum. "
                f"Delete {folder} and run prepare again."
            )
