"""One piece of the input → its shards: what runs in Ray's workers."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.manifest import BATCH_ROWS, Shard, sha256_of
from orchestrator.data.sources import Piece, line_number_at, read_piece
from orchestrator.model.config import load_tokenizer, max_length_tokens, tokenizer_fingerprint
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow, EncodedRow

ENCODE_ROWS = 1024
"""Rows tokenised at a time."""
EXAMPLES = 20
"""Bad rows shown in errors and manifests; all of them are listed in BAD_ROWS."""
BAD_ROWS = "bad_rows.jsonl"
COUNTS = ("input_rows", "bad_rows", "truncated", "rows", "tokens", "targets")
"""What is counted per piece and adds up over pieces."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class PieceWork:
    """One task: encode `piece` and write its shards into `folder`."""

    spec: JobSpec
    piece: Piece
    keep: Split | None
    labels: tuple[str, ...]
    folder: str


def scan_piece(work: PieceWork) -> dict[str, Any]:
    """The distinct labels of a piece."""
    column = work.spec.task.label_source
    assert column is not None
    labels = {
        label
        for item in read_piece(work.piece, work.spec.task.columns)
        if isinstance(item.row, dict)
        for label in work.spec.task.labels_in(item.row.get(column))
    }
    return {"labels": sorted(labels)[:2000]}


def prepare_piece(work: PieceWork) -> dict[str, Any]:
    """Encode, pack and write one piece; returns its shards and counts, JSON-ready."""
    writer = ShardWriter(work)
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for item in read_piece(work.piece, work.spec.task.columns):
        if work.keep is not None and _split_of(work, item.key) != work.keep:
            continue
        writer.input_rows += 1
        if isinstance(item.row, BadRow):
            writer.reject(item.number, item.row.why)
            continue
        rows.append(item.row)
        numbers.append(item.number)
        if len(rows) == ENCODE_ROWS:
            writer.encode(rows, numbers)
            rows, numbers = [], []
    writer.encode(rows, numbers)
    return writer.finish()


def _split_of(work: PieceWork, key: int) -> Split:
    """Hold-out by a hash of seed, file and row: the same whatever else is in the data."""
    text = f"{work.spec.seed}/{work.piece.file_index}/{key}".encode()
    share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
    return "eval" if share < (work.spec.data.eval_fraction or 0) else "train"


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
        self.bad: list[tuple[int, str]] = []
        self.input_rows = self.bad_rows = self.truncated = 0
        self.rows = self.tokens = self.targets = self.longest = self.longest_target = 0

    def reject(self, number: int, why: str) -> None:
        """Record a row that cannot be used."""
        self.bad_rows += 1
        self.bad.append((number, why))

    def encode(self, rows: list[dict[str, Any]], numbers: list[int]) -> None:
        """Encode raw rows and write what fills a shard."""
        if not rows:
            return
        encoded = self.task.encode(rows, self.tokenizer, self.max_length, self.work.labels)
        good: list[EncodedRow] = []
        for row, number in zip(encoded, numbers, strict=True):
            if isinstance(row, BadRow):
                self.reject(number, row.why)
            elif row["truncated"] and self.work.spec.data.over_long == "bad_row":
                self.reject(number, f"longer than data.max_length_tokens = {self.max_length}")
            else:
                self.truncated += row["truncated"]
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
        piece = self.work.piece
        first_line = 0  # rows of csv and Parquet files are numbered through already
        if self.bad and piece.start and piece.file.format in ("jsonl", "text"):
            first_line = line_number_at(piece.file, piece.start)
        bad = [
            {"file": piece.file.url, "row": first_line + n, "why": w} for n, w in sorted(self.bad)
        ]
        if bad:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in bad)
            file = Path(self.work.folder) / f"bad-{piece.index:05d}.jsonl"
            file.write_text(lines, encoding="utf-8")
        return {
            "shards": self.shards,
            "bad": bad[:EXAMPLES],
            "longest": self.longest,
            "longest_target": self.longest_target,
            **{name: getattr(self, name) for name in COUNTS},
        }

    def _write(self, count: int) -> None:
        import pyarrow as pa

        rows, self.ready = self.ready[:count], self.ready[count:]
        name = f"shard-{self.work.piece.index:05d}-{len(self.shards):05d}.arrow"
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
