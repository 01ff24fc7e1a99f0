"""Pieces of the input → shards: what runs in Ray's workers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.manifest import BATCH_ROWS, Shard, sha256_of
from orchestrator.data.readers import Notes, RawItem, line_number_at, read_piece
from orchestrator.data.sources import Piece
from orchestrator.model.positions import max_length_tokens
from orchestrator.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow, EncodedRow
from orchestrator.tasks.labels import printable

ENCODE_ROWS = 1024
"""Rows tokenized at a time."""
EXAMPLES = 20
"""Bad rows shown in errors and manifests; all of them are listed in BAD_ROWS."""
BAD_ROWS = "bad_rows.jsonl"
HASHES = "row_hashes.bin"
"""8 bytes for each used input row, equal for rows of equal content."""
COUNTS = ("input_rows", "other_rows", "bad_rows", "truncated", "rows", "tokens", "targets")
"""What is counted per piece and adds up over pieces."""

Split = Literal["train", "eval"]
Place = tuple[Piece, int]
"""Where a row stands: its piece, and its number in it."""


@dataclass(frozen=True)
class PieceWork:
    """One task: encode the rows of `pieces` and write their shards into `folder`.

    `names`: column → class names from files' metadata, which integers in the rows stand for.
    """

    spec: JobSpec
    pieces: tuple[Piece, ...]
    keep: Split | None
    labels: tuple[str, ...]
    folder: str
    index: int = 0
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def rows(self, notes: Notes | None = None) -> Iterator[tuple[Piece, RawItem]]:
        """Yield the rows of all pieces, each with its piece."""
        for piece in self.pieces:
            task = self.spec.task
            items = read_piece(piece, task.columns, task.optional_columns, notes, self.names)
            yield from ((piece, item) for item in items)


def prepare_piece(work: PieceWork) -> dict[str, Any]:
    """Encode, pack and write the work's rows; returns their shards and counts, JSON-ready."""
    notes, writer = Notes(), ShardWriter(work)
    rows: list[dict[str, Any]] = []
    places: list[Place] = []
    shares = [1.0, 0.0]
    for piece, item in work.rows(notes):
        if work.keep is not None:
            share = _share_of(work, piece, item.key)
            shares = [min(shares[0], share), max(shares[1], share)]
            held_out = share < (work.spec.data.eval_fraction or 0)
            if held_out != (work.keep == "eval"):
                writer.other_rows += 1
                continue
        writer.input_rows += 1
        if isinstance(item.row, BadRow):
            writer.reject((piece, item.number), item.row.why)
            continue
        rows.append(item.row)
        places.append((piece, item.number))
        if len(rows) == ENCODE_ROWS:
            writer.encode(rows, places)
            rows, places = [], []
    writer.encode(rows, places)
    return {**writer.finish(), "shares": shares, "warnings": notes.found}


def _share_of(work: PieceWork, piece: Piece, key: int) -> float:
    """Return a number of 0 to 1 by a hash of seed, file and row: the same whatever else is in the data."""
    text = f"{work.spec.seed}/{piece.file_index}/{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def row_hash(row: dict[str, Any], columns: Sequence[str]) -> bytes:
    """Return 8 bytes that are equal for rows of equal content."""
    content = json.dumps([row.get(c) for c in columns], sort_keys=True, default=_digest)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _digest(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).hexdigest()


@lru_cache(maxsize=2)
def _tokenizer(fingerprint: str, spec_json: str) -> Any:
    """Kept between the pieces of a worker process, until the tokenizer's files change."""
    return load_tokenizer(JobSpec.model_validate_json(spec_json))


class ShardWriter:
    """Encodes rows of one piece and writes them to shards of at most `shard_rows` rows."""

    def __init__(self, work: PieceWork) -> None:
        import pyarrow as pa

        self.work = work
        self.task = work.spec.task
        self.tokenizer = _tokenizer(tokenizer_fingerprint(work.spec), work.spec.model_dump_json())
        self.max_length = max_length_tokens(work.spec)
        kinds = {
            "int": pa.int64(),
            "ints": pa.list_(pa.int32()),
            "float": pa.float64(),
            "floats": pa.list_(pa.float32()),
            "bytes": pa.list_(pa.uint8()),
            "text": pa.string(),
        }
        fields = [pa.field(n, kinds[k]) for n, k in self.task.features().items()]
        counts = [pa.field("length", pa.int32()), pa.field("n_targets", pa.int32())]
        self.schema = pa.schema(fields + counts)
        self.held: list[EncodedRow] = []
        self.ready: list[EncodedRow] = []
        self.shards: list[dict[str, Any]] = []
        self.bad: list[tuple[Place, str]] = []
        self.reasons: Counter[str] = Counter()
        self.hashes = bytearray()
        self.notes: Counter[str] = Counter()
        self.input_rows = self.other_rows = self.bad_rows = self.truncated = 0
        self.rows = self.tokens = self.targets = self.longest = self.longest_target = 0

    def reject(self, place: Place, why: str) -> None:
        """Record a row that cannot be used."""
        self.bad_rows += 1
        why = printable(why)
        self.reasons[reason_kind(why)] += 1
        self.bad.append((place, why))

    def encode(self, rows: list[dict[str, Any]], places: list[Place]) -> None:
        """Encode raw rows and write what fills a shard."""
        if not rows:
            return
        encoded = self.task.encode(rows, self.tokenizer, self.max_length, self.work.labels)
        good: list[EncodedRow] = []
        columns = (*self.task.columns, *self.task.optional_columns)
        for raw, row, place in zip(rows, encoded, places, strict=True):
            if isinstance(row, BadRow):
                self.reject(place, row.why)
            elif row["truncated"] and self.work.spec.data.truncation == "error":
                self.reject(place, f"longer than data.max_length_tokens = {self.max_length}")
            else:
                self.truncated += row["truncated"]
                self.notes.update(row.pop("notes", ()))
                self.hashes += row_hash(raw, columns)
                good.append(row)
        packed, self.held = self.task.pack([*self.held, *good], self.max_length)
        self.ready += packed
        while len(self.ready) >= self.work.spec.data.shard_rows:
            self._write(self.work.spec.data.shard_rows)

    def finish(self) -> dict[str, Any]:
        """Write the rest and describe everything."""
        self.ready += self.held
        if self.ready:
            self._write(len(self.ready))
        index, folder = self.work.index, Path(self.work.folder)
        bad = bad_records(self.bad)
        if bad:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in bad)
            (folder / f"bad-{index:05d}.jsonl").write_text(lines, encoding="utf-8")
        if self.hashes:
            (folder / f"hashes-{index:05d}.bin").write_bytes(bytes(self.hashes))
        return {
            "shards": self.shards,
            "bad": bad[:EXAMPLES],
            "reasons": self.reasons,
            "notes": dict(self.notes),
            "longest": self.longest,
            "longest_target": self.longest_target,
            **{name: getattr(self, name) for name in COUNTS},
        }

    def _write(self, count: int) -> None:
        import pyarrow as pa

        rows, self.ready = self.ready[:count], self.ready[count:]
        name = f"shard-{self.work.index:05d}-{len(self.shards):05d}.arrow"
        path = Path(self.work.folder) / name
        lengths = [self.task.length(row) for row in rows]
        targets = [row["n_targets"] for row in rows]
        columns = [[row[n] for row in rows] for n in self.task.features()] + [lengths, targets]
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, self.schema, strict=True)]
        with open(path, "wb") as handle:
            with pa.ipc.new_file(handle, self.schema) as out:
                table = pa.Table.from_arrays(arrays, schema=self.schema)
                out.write_table(table, max_chunksize=BATCH_ROWS)
            handle.flush()
            os.fsync(handle.fileno())
        self.rows += count
        self.tokens += sum(lengths)
        self.targets += sum(targets)
        decoded = [self.task.target_length(row) for row in rows]
        self.longest = max(self.longest, *map(self.task.padded_length, rows))
        self.longest_target = max(self.longest_target, *decoded)
        shard = Shard(file=name, rows=count, size_bytes=path.stat().st_size, sha256=sha256_of(path))
        self.shards.append(shard.model_dump())


def bad_records(bad: Sequence[tuple[Place, str]]) -> list[dict[str, Any]]:
    """Return file, row and reason of bad rows, in the order of the input."""
    first_lines: dict[int, int] = {}
    for (piece, _), _ in bad:
        # Rows of CSV and Parquet files, and of documents, are numbered through already.
        numbered_anew = piece.start and piece.file.format in ("jsonl", "text")
        if numbered_anew and piece.index not in first_lines:
            first_lines[piece.index] = line_number_at(piece.file, piece.start)
    ordered = sorted(bad, key=lambda one: (one[0][0].index, one[0][1]))
    return [
        {"file": piece.file.url, "row": first_lines.get(piece.index, 0) + number, "why": why}
        for (piece, number), why in ordered
    ]


def reason_kind(why: str) -> str:
    """Return a reason without the values that differ from row to row."""
    column = re.match(r"column '[^']*' ", why)
    start = column[0] if column else ""
    rest = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", why[len(start) :])
    return start + re.split(r"[;:,(]|, got", rest)[0].strip()
