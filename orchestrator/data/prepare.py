"""Raw rows → tokenised, packed, sharded Arrow with a manifest, committed by one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.manifest import (
    FORMAT_VERSION,
    BadRowRecord,
    Manifest,
    Shard,
    read_manifest,
    sha256_of,
)
from orchestrator.data.sources import (
    Piece,
    SourceFile,
    find_files,
    line_number_at,
    read_piece,
    split_into_pieces,
)
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.model.config import load_tokenizer, max_length_tokens, tokenizer_fingerprint
from orchestrator.run_folder import fsync_dir, write_json
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow, EncodedRow

ENCODE_ROWS = 1024
"""Rows tokenised at a time."""
BATCH_ROWS = 1024
"""Rows per Arrow record batch: what one random read touches."""
EXAMPLES = 20
"""Bad rows listed by name in errors and manifests."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Prepared:
    """Where a data set lies, and what is in it. `was_ready`: nothing had to be done."""

    folder: Path
    manifest: Manifest
    was_ready: bool = True


def prepare(spec: JobSpec) -> dict[Split, Prepared]:
    """Prepare the job's training and evaluation rows; what is ready already is found and reused.

    Needs a running Ray where there is work to do. Raises DataError for input that cannot be used.
    """
    out: dict[Split, Prepared] = {"train": prepare_split(spec, "train")}
    if spec.data.eval is not None or spec.data.eval_fraction is not None:
        out["eval"] = prepare_split(spec, "eval", out["train"].manifest.labels)
    return out


def find_prepared(spec: JobSpec) -> dict[Split, Prepared] | None:
    """What `prepare` would return, where it has nothing to do; else None."""
    files = find_files(spec.data.train, spec.data.format)
    train = _find(spec, "train", files, getattr(spec.task, "labels", None))
    if train is None:
        return None
    if spec.data.eval is None and spec.data.eval_fraction is None:
        return {"train": train}
    files = files if spec.data.eval is None else find_files(spec.data.eval, spec.data.format)
    evaluation = _find(spec, "eval", files, train.manifest.labels)
    return {"train": train, "eval": evaluation} if evaluation else None


def prepare_split(
    spec: JobSpec, split: Split, labels: tuple[str, ...] | None = None, paths: Any = None
) -> Prepared:
    """Prepare one split, or any `paths` in its place (`eval RUN --data …` does so)."""
    source = paths or (spec.data.eval if split == "eval" and spec.data.eval else spec.data.train)
    files = find_files(source, spec.data.format)
    held_out = paths is None and spec.data.eval_fraction is not None
    labels = labels if labels is not None else getattr(spec.task, "labels", None)
    if ready := _find(spec, split, files, labels, held_out):
        return ready
    return _make(
        spec,
        split if held_out else None,
        files,
        labels,
        _folder(spec, split, files, labels, held_out),
    )


def _find(
    spec: JobSpec,
    split: Split,
    files: list[SourceFile],
    labels: tuple[str, ...] | None,
    held_out: bool | None = None,
) -> Prepared | None:
    held_out = spec.data.eval_fraction is not None if held_out is None else held_out
    folder = _folder(spec, split, files, labels, held_out)
    manifest = read_manifest(folder)
    return Prepared(folder, manifest) if manifest else None


def _folder(
    spec: JobSpec,
    split: Split,
    files: list[SourceFile],
    labels: tuple[str, ...] | None,
    held_out: bool,
) -> Path:
    facts = {
        "version": FORMAT_VERSION,
        "files": [(f.format, f.size_bytes, f.digest) for f in files],
        "task": spec.task.model_dump(mode="json"),
        "tokenizer": tokenizer_fingerprint(spec),
        "max_length_tokens": max_length_tokens(spec),
        "over_long": spec.data.over_long,
        "on_bad_row": spec.data.on_bad_row,
        "shard_rows": spec.data.shard_rows,
        "labels": labels,
        "held_out": [split, spec.data.eval_fraction, spec.seed] if held_out else None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(spec.data.prepared_dir).absolute() / digest


def _make(
    spec: JobSpec,
    keep: Split | None,
    files: list[SourceFile],
    labels: tuple[str, ...] | None,
    folder: Path,
) -> Prepared:
    pieces = split_into_pieces(files)
    if labels is None and spec.task.label_source is not None:
        labels = _scan_labels(spec, pieces, keep)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        work = [PieceWork(spec, p, keep, labels or (), str(temporary)) for p in pieces]
        done = _run(work, prepare_piece)
        manifest = _manifest(spec, folder.name, files, labels or (), done)
        write_json(temporary / "manifest.json", manifest.model_dump(mode="json"))
        return Prepared(*_commit(temporary, folder, manifest), was_ready=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _commit(temporary: Path, folder: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    fsync_dir(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:  # somebody else prepared the same fingerprint in the meantime
        theirs = read_manifest(folder)
        if theirs is None:
            raise
        return folder, theirs
    fsync_dir(folder.parent)
    return folder, manifest


@dataclass(frozen=True)
class PieceWork:
    """One task: encode `piece` and write its shards into `folder`."""

    spec: JobSpec
    piece: Piece
    keep: Split | None
    labels: tuple[str, ...]
    folder: str


def _run(work: Sequence[PieceWork], function: Any) -> list[dict[str, Any]]:
    """Apply `function` to each piece through Ray Data, results in the order of the pieces.

    Raises the first error that a piece ends with.
    """
    import ray
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    items = [{"work": w} for w in work]
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            lambda item: {"out": json.dumps(function(item["work"]))}
        )
    try:
        return [json.loads(r["out"]) for r in dataset.take_all()]
    except RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise error.cause from None  # its words are for the user, Ray's traceback is not
        raise


def _scan_labels(spec: JobSpec, pieces: Sequence[Piece], keep: Split | None) -> tuple[str, ...]:
    found = _run([PieceWork(spec, p, None, (), "") for p in pieces], scan_piece)
    labels = sorted({label for one in found for label in one["labels"]})
    if len(labels) < 2:
        raise DataError(
            f"task.label_column {spec.task.label_source!r} holds {len(labels)} distinct value(s): {labels}. "
            "Classification needs two or more."
        )
    if len(labels) > 1000:
        raise DataError(
            f"task.label_column {spec.task.label_source!r} holds {len(labels)} distinct values. "
            "If it is the right column, list them under task.labels."
        )
    return tuple(labels)


def scan_piece(work: PieceWork) -> dict[str, Any]:
    """The distinct labels of a piece."""
    column = work.spec.task.label_source
    assert column is not None
    labels = {
        str(item.row[column])
        for item in read_piece(work.piece, work.spec.task.columns)
        if isinstance(item.row, dict) and item.row.get(column) not in (None, "")
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
        kinds = {"int": pa.int64(), "ints": pa.list_(pa.int32())}
        fields = [pa.field(n, kinds[k]) for n, k in self.task.features().items()]
        counts = [pa.field("length", pa.int32()), pa.field("n_targets", pa.int32())]
        self.schema = pa.schema(fields + counts)
        self.held: list[EncodedRow] = []
        self.ready: list[EncodedRow] = []
        self.shards: list[dict[str, Any]] = []
        self.bad: list[tuple[int, str]] = []
        self.input_rows = self.bad_rows = self.truncated = 0
        self.rows = self.tokens = self.targets = self.longest = 0

    def reject(self, number: int, why: str) -> None:
        """Record a row that cannot be used."""
        self.bad_rows += 1
        if len(self.bad) < EXAMPLES:
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
        first_line = line_number_at(piece.file, piece.start) if self.bad and piece.start and (
            piece.file.format in ("jsonl", "text")
        ) else 0  # fmt: skip
        return {
            "shards": self.shards,
            "bad": [
                {"file": piece.file.url, "row": first_line + n, "why": w}
                for n, w in sorted(self.bad)
            ],
            **{
                name: getattr(self, name)
                for name in (
                    "input_rows",
                    "bad_rows",
                    "truncated",
                    "rows",
                    "tokens",
                    "targets",
                    "longest",
                )
            },
        }

    def _write(self, count: int) -> None:
        import pyarrow as pa

        rows, self.ready = self.ready[:count], self.ready[count:]
        name = f"shard-{self.work.piece.index:05d}-{len(self.shards):05d}.arrow"
        path = Path(self.work.folder) / name
        lengths = [len(row["input_ids"]) for row in rows]
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
        self.longest = max(self.longest, *lengths)
        shard = Shard(file=name, rows=count, size_bytes=path.stat().st_size, sha256=sha256_of(path))
        self.shards.append(shard.model_dump())


def _manifest(
    spec: JobSpec,
    fingerprint: str,
    files: Sequence[SourceFile],
    labels: tuple[str, ...],
    done: Sequence[dict[str, Any]],
) -> Manifest:
    total = {k: sum(one[k] for one in done) for k in ("input_rows", "bad_rows", "truncated", "rows", "tokens", "targets")}  # fmt: skip
    bad = [BadRowRecord(**record) for one in done for record in one["bad"]][:EXAMPLES]
    if total["bad_rows"] and spec.data.on_bad_row == "error":
        raise DataError(_bad_rows_message(total["bad_rows"], total["input_rows"], bad))
    if total["rows"] == 0:
        names = ", ".join(f.url for f in files)
        raise DataError(
            f"{names}: no usable row ({total['input_rows']} read, {total['bad_rows']} bad)."
        )
    return Manifest(
        fingerprint=fingerprint,
        inputs=tuple(f.url for f in files),
        features=dict(spec.task.features()),
        labels=labels,
        max_length_tokens=max_length_tokens(spec),
        longest_tokens=max(one["longest"] for one in done),
        rows=total["rows"],
        tokens=total["tokens"],
        target_tokens=total["targets"],
        input_rows=total["input_rows"],
        truncated_rows=total["truncated"],
        bad_rows=total["bad_rows"],
        bad_row_examples=tuple(bad),
        shards=tuple(Shard(**s) for one in done for s in one["shards"]),
    )


def _bad_rows_message(count: int, total: int, examples: Sequence[BadRowRecord]) -> str:
    lines = [f"{count} of {total} rows cannot be used:"]
    lines += [f"  {r.file}, row {r.row}: {r.why}" for r in examples]
    if count > len(examples):
        lines.append(f"  … and {count - len(examples)} more")
    lines.append(
        "Mend them, or set data.on_bad_row=skip: they are then counted and listed in the manifest."
    )
    return "\n".join(lines)
