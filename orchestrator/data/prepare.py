"""Raw rows → tokenised, packed, sharded Arrow with a manifest, committed by one rename."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.data.commit import make_folder, run_all, work_of
from orchestrator.data.manifest import (
    FORMAT_VERSION,
    BadRowRecord,
    Manifest,
    Shard,
    read_manifest,
    verify_shards,
)
from orchestrator.data.patience import patiently
from orchestrator.data.sources import Piece, SourceFile, find_files, split_into_pieces
from orchestrator.data.teacher import ask_teacher, teacher_folder
from orchestrator.data.write import (
    BAD_ROWS,
    COUNTS,
    EXAMPLES,
    PieceWork,
    Split,
    prepare_piece,
    scan_piece,
)
from orchestrator.errors import DataError
from orchestrator.model.config import (
    check_max_length,
    max_length_tokens,
    tokenizer_fingerprint,
)
from orchestrator.spec import JobSpec

__all__ = ["Prepared", "Split", "find_prepared", "prepare", "prepare_split"]


@dataclass(frozen=True)
class Prepared:
    """Where a data set lies, and what is in it. `was_ready`: nothing had to be done."""

    folder: Path
    manifest: Manifest
    was_ready: bool = True
    teacher: Prepared | None = None
    """What the job's teacher says of these rows, row by row."""


def prepare(spec: JobSpec) -> dict[Split, Prepared]:
    """Prepare the job's training and evaluation rows; what is ready already is found and reused.

    Needs a running Ray where there is work to do. Raises DataError for input that cannot be used.
    """
    check_max_length(spec)
    out: dict[Split, Prepared] = {"train": _taught(spec, prepare_split(spec, "train"))}
    if spec.data.eval is not None or spec.data.eval_fraction is not None:
        out["eval"] = prepare_split(spec, "eval", out["train"].manifest.labels)
    return out


def find_prepared(spec: JobSpec) -> dict[Split, Prepared] | None:
    """What `prepare` would return, where it has nothing to do; else None."""
    check_max_length(spec)
    files = find_files(spec.data.train, spec.data.format)
    train = _find(spec, "train", files, getattr(spec.task, "labels", None))
    if train is None:
        return None
    if spec.distillation is not None:
        train = replace(train, teacher=_ready(teacher_folder(spec, train.manifest)))
        if train.teacher is None:
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
        verify_shards(ready.folder, ready.manifest)
        return ready
    return _make(
        spec,
        split if held_out else None,
        files,
        labels,
        prepared_folder(spec, split, files, labels, held_out),
    )


def _find(
    spec: JobSpec,
    split: Split,
    files: list[SourceFile],
    labels: tuple[str, ...] | None,
    held_out: bool | None = None,
) -> Prepared | None:
    held_out = spec.data.eval_fraction is not None if held_out is None else held_out
    folder = prepared_folder(spec, split, files, labels, held_out)
    return _ready(folder)


def _ready(folder: Path) -> Prepared | None:
    manifest = read_manifest(folder)
    return Prepared(folder, manifest) if manifest else None


def _taught(spec: JobSpec, train: Prepared) -> Prepared:
    """The training rows with what the job's teacher says of them, which is worked out where it is not ready."""
    if spec.distillation is None:
        return train
    folder = teacher_folder(spec, train.manifest)
    teacher = _ready(folder)
    if teacher is None:
        ask = partial(ask_teacher, spec, train.folder, train.manifest, folder.name)
        teacher = Prepared(*make_folder(folder, ask), was_ready=False)
    else:
        verify_shards(folder, teacher.manifest)
    return replace(train, teacher=teacher)


def prepared_folder(
    spec: JobSpec,
    split: Split,
    files: list[SourceFile],
    labels: tuple[str, ...] | None,
    held_out: bool,
) -> Path:
    """Where the rows of these inputs lie once they are prepared: named by all that they depend on."""
    facts = {
        "version": FORMAT_VERSION,
        "files": [(f.format, f.size_bytes, f.digest) for f in files],
        "task": spec.task.model_dump(mode="json", exclude=set(spec.task.after_prepare)),
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

    def write(temporary: Path) -> Manifest:
        work = [PieceWork(spec, p, keep, labels or (), str(temporary)) for p in pieces]
        done = _run(work, prepare_piece)
        _join_bad_rows(temporary)
        return _manifest(spec, folder.name, files, labels or (), done)

    return Prepared(*make_folder(folder, write), was_ready=False)


def _join_bad_rows(folder: Path) -> None:
    """One list of all pieces' bad rows, in the order of the input; no file where there are none."""
    for part in sorted(folder.glob("bad-*.jsonl")):
        with open(folder / BAD_ROWS, "ab") as whole:
            whole.write(part.read_bytes())
        part.unlink()


def _run(work: Sequence[PieceWork], function: Any) -> list[dict[str, Any]]:
    """Apply `function` to each piece, results in the order of the pieces."""
    return run_all(work, lambda item: {"out": json.dumps(_patiently(function, work_of(item)))})


def _patiently(function: Any, work: PieceWork) -> dict[str, Any]:
    done: dict[str, Any] = patiently(work.piece.file.url, partial(function, work))
    return done


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


def _manifest(
    spec: JobSpec,
    fingerprint: str,
    files: Sequence[SourceFile],
    labels: tuple[str, ...],
    done: Sequence[dict[str, Any]],
) -> Manifest:
    total = {name: sum(one[name] for one in done) for name in COUNTS}
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
        longest_target_tokens=max(one["longest_target"] for one in done),
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
        f"Mend them, or set data.on_bad_row=skip: they are then counted, and listed in {BAD_ROWS} beside the shards."
    )
    return "\n".join(lines)
