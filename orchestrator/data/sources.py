"""Raw input cut into pieces, and pieces joined into the work of one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from orchestrator.data.files import (
    UNREADABLE,
    SourceFile,
    find_files,
    open_filesystem,
    unreadable,
)
from orchestrator.data.retry import with_retries

__all__ = ["Piece", "SourceFile", "find_files", "grouped", "split_into_pieces"]

PIECE_BYTES = 64 * 2**20
"""Text-like files are cut at line ends into pieces of about this size; each is one task."""
GROUP_BYTES = 8 * 2**20
"""Smaller pieces are read together by one task, up to this many bytes."""
GROUP_PIECES = 512
"""Most pieces of one task."""


@dataclass(frozen=True)
class Piece:
    """A part of one file that one task reads.

    `start` and `stop` are bytes (jsonl, text), row groups (parquet), or 0 and 0 (others: the whole file).
    """

    index: int
    file_index: int
    file: SourceFile
    start: int = 0
    stop: int = 0

    @property
    def size_bytes(self) -> int:
        """About the bytes that are read."""
        by_bytes = self.file.format in ("jsonl", "text") and self.stop
        return self.stop - self.start if by_bytes else self.file.size_bytes


def split_into_pieces(files: Sequence[SourceFile]) -> list[Piece]:
    """Cut the files so that no piece is too much for one task."""
    pieces: list[Piece] = []
    for i, file in enumerate(files):
        try:
            ranges = with_retries(file.url, partial(_ranges, file))
        except UNREADABLE as error:
            raise unreadable(file, error) from error
        for start, stop in ranges:
            pieces.append(Piece(len(pieces), i, file, start, stop))
    return pieces


def grouped(pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """Join consecutive small pieces, so that a task has enough to do.

    Depends on the files alone, not on the cluster: shards are the same everywhere.
    """
    groups: list[list[Piece]] = []
    held = 0
    for piece in pieces:
        full = held + piece.size_bytes > GROUP_BYTES
        if not groups or full or len(groups[-1]) == GROUP_PIECES:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.size_bytes
    return [tuple(group) for group in groups]


def _ranges(file: SourceFile) -> list[tuple[int, int]]:
    match file.format:
        case "parquet":
            import pyarrow.parquet as pq

            filesystem, path = open_filesystem(file.url)
            with filesystem.open(path, "rb") as handle:
                metadata = pq.ParquetFile(handle).metadata
                sizes = [
                    metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
                ]
            return _row_groups(sizes)
        case "jsonl" | "text" if not file.codec:
            edges = [*range(0, file.size_bytes, PIECE_BYTES), file.size_bytes]
            return list(pairwise(edges)) or [(0, 0)]
        case _:
            return [(0, 0)]


def _row_groups(sizes: list[int]) -> list[tuple[int, int]]:
    """Consecutive row groups, joined up to PIECE_BYTES."""
    out: list[tuple[int, int]] = []
    start, held = 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= PIECE_BYTES or i == len(sizes) - 1:
            out.append((start, i + 1))
            start, held = i + 1, 0
    return out
