"""Raw rows → tokenized, packed, sharded Arrow with a manifest, committed by one rename."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.data.commit import make_folder, run_all, work_of
from orchestrator.data.label_scan import label_set, names_of_classes, reason_lines
from orchestrator.data.manifest import (
    FORMAT_VERSION,
    BadRowRecord,
    Manifest,
    Shard,
    read_manifest,
    verify_shards,
)
from orchestrator.data.readers import Notes
from orchestrator.data.retry import with_retries
from orchestrator.data.sources import SourceFile, find_files, grouped, split_into_pieces
from orchestrator.data.teacher import ask_teacher, teacher_folder
from orchestrator.data.write import (
    BAD_ROWS,
    COUNTS,
    EXAMPLES,
    HASHES,
    PieceWork,
    Split,
    prepare_piece,
)
from orchestrator.effects import Effect, without
from orchestrator.errors import DataError
from orchestrator.model.causal import settled
from orchestrator.model.positions import check_max_length, max_length_tokens
from orchestrator.model.tokenizer import check_tokenizer, tokenizer_fingerprint
from orchestrator.spec import JobSpec

__all__ = ["Prepared", "Split", "find_prepared", "prepare", "prepare_split"]


MAX_HASH_BYTES = 2**28
"""Larger sets of rows are not searched for rows that they share."""


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: its folder and its manifest. `was_ready`: nothing had to be done."""

    folder: Path
    manifest: Manifest
    was_ready: bool = True
    teacher: Prepared | None = None
    """What the job's teacher says of these rows, row by row."""


FINGERPRINTED = {"truncate": "truncate", "error": "bad_row"}
"""`data.truncation` as shards of earlier versions were named after it: these stay valid."""


def prepare(spec: JobSpec) -> dict[Split, Prepared]:
    """Prepare the job's training and evaluation rows; what is ready already is found and reused.

    Needs a running Ray where there is work to do. Raises DataError for input that cannot be used.
    """
    spec = settled(spec)
    check_max_length(spec)
    check_tokenizer(spec)
    out: dict[Split, Prepared] = {"train": _taught(spec, prepare_split(spec, "train"))}
    if spec.data.eval is not None or spec.data.eval_fraction is not None:
        out["eval"] = prepare_split(spec, "eval", out["train"].manifest.labels)
    return out


def find_prepared(spec: JobSpec) -> dict[Split, Prepared] | None:
    """Return the prepared data if there is nothing left to prepare, else None."""
    spec = settled(spec)
    check_max_length(spec)
    check_tokenizer(spec)
    files = _files_of(spec, spec.data.train)
    train = _find(spec, "train", files, getattr(spec.task, "labels", None))
    if train is None:
        return None
    if spec.distillation is not None:
        train = replace(train, teacher=_ready(teacher_folder(spec, train.manifest)))
        if train.teacher is None:
            return None
    if spec.data.eval is None and spec.data.eval_fraction is None:
        return {"train": train}
    files = files if spec.data.eval is None else _files_of(spec, spec.data.eval)
    evaluation = _find(spec, "eval", files, train.manifest.labels)
    return {"train": train, "eval": evaluation} if evaluation else None


def _files_of(spec: JobSpec, paths: str | Sequence[str]) -> list[SourceFile]:
    return find_files(paths, spec.data.format, spec.data.delimiter)


def prepare_split(
    spec: JobSpec, split: Split, labels: tuple[str, ...] | None = None, paths: Any = None
) -> Prepared:
    """Prepare one split, or any `paths` in its place (`eval RUN --data …` does so)."""
    spec = _of_split(settled(spec), split)
    source = paths or (spec.data.eval if split == "eval" and spec.data.eval else spec.data.train)
    files = _files_of(spec, source)
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
    folder = prepared_folder(_of_split(spec, split), split, files, labels, held_out)
    return _ready(folder)


def _of_split(spec: JobSpec, split: Split) -> JobSpec:
    """The job with its task as the rows of a split are prepared by it."""
    if split == "train":
        return spec
    return spec.model_copy(update={"task": spec.task.for_evaluation()})


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
    """Return the folder of these inputs' prepared rows, named by everything that they depend on."""
    facts = {
        "version": FORMAT_VERSION,
        "files": [(f.format, f.delimiter, f.size_bytes, f.digest) for f in files],
        "task": spec.task.model_dump(
            mode="json", exclude=without(JobSpec, Effect.ROWS).get("task")
        ),
        "tokenizer": tokenizer_fingerprint(spec),
        "max_length_tokens": max_length_tokens(spec),
        "over_long": FINGERPRINTED[spec.data.truncation],
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
    groups = grouped(split_into_pieces(files))
    names = names_of_classes(spec, files)
    warnings = _repeated_files(files)

    def work_on(folder: str, keep: Split | None) -> list[PieceWork]:
        known = labels or ()
        return [
            PieceWork(spec, pieces, keep, known, folder, i, names)
            for i, pieces in enumerate(groups)
        ]

    if labels is None and spec.task.label_source is not None:
        labels, on_labels = label_set(spec, work_on("", None), _run)
        warnings += on_labels

    def write(temporary: Path) -> Manifest:
        done = _run(work_on(str(temporary), keep), prepare_piece)
        _join(temporary, "bad-*.jsonl", BAD_ROWS)
        _join(temporary, "hashes-*.bin", HASHES)
        return _manifest(spec, keep, folder.name, files, labels or (), warnings, done)

    return Prepared(*make_folder(folder, write), was_ready=False)


def _repeated_files(files: Sequence[SourceFile]) -> list[str]:
    """Return warnings on files that are named twice, or have the same content."""
    seen: dict[str, SourceFile] = {}
    out = []
    for file in files:
        other = seen.setdefault(file.digest, file)
        if other is file:
            continue
        same = f"{file.url} is named more than once"
        alike = f"{file.url} has the same content as {other.url}"
        out.append(f"{same if other.url == file.url else alike}: its rows count each time")
    return out[:5] + ([f"… and {len(out) - 5} more repeated files"] if len(out) > 5 else [])


def _join(folder: Path, parts: str, name: str) -> None:
    """Join what the tasks wrote into one file, in the order of the input; no file where there is nothing."""
    for part in sorted(folder.glob(parts)):
        with open(folder / name, "ab") as whole:
            whole.write(part.read_bytes())
        part.unlink()


def _run(work: Sequence[PieceWork], function: Any) -> list[dict[str, Any]]:
    """Apply `function` to each item of work, results in their order."""
    return run_all(work, lambda item: {"out": json.dumps(_with_retries(function, work_of(item)))})


def _with_retries(function: Any, work: PieceWork) -> dict[str, Any]:
    done: dict[str, Any] = with_retries(work.pieces[0].file.url, partial(function, work))
    return done


def shared_rows(train: Prepared, evaluation: Prepared) -> int | None:
    """Return how many evaluation rows equal a training row; None where that is not known."""
    import numpy as np

    paths = [one.folder / HASHES for one in (train, evaluation)]
    if not all(p.is_file() and p.stat().st_size <= MAX_HASH_BYTES for p in paths):
        return None
    hashes = [np.fromfile(p, dtype=np.uint64) for p in paths]
    return int(np.isin(hashes[1], hashes[0]).sum())


def _manifest(
    spec: JobSpec,
    keep: Split | None,
    fingerprint: str,
    files: Sequence[SourceFile],
    labels: tuple[str, ...],
    warnings: Sequence[str],
    done: Sequence[dict[str, Any]],
) -> Manifest:
    total = {name: sum(one[name] for one in done) for name in COUNTS}
    bad = [BadRowRecord(**record) for one in done for record in one["bad"]][:EXAMPLES]
    if total["bad_rows"] and spec.data.on_bad_row == "error":
        raise DataError(_bad_rows_message(total["bad_rows"], total["input_rows"], bad))
    if keep is not None and total["input_rows"] == 0 and total["other_rows"]:
        raise DataError(_split_message(spec, keep, total["other_rows"], done))
    if total["rows"] == 0:
        names = ", ".join(f.url for f in files[:5])
        reasons = sum((Counter(one["reasons"]) for one in done), Counter[str]())
        lines = [f"{names}: no usable row ({total['input_rows']} read, {total['bad_rows']} bad)."]
        if reasons:
            lines += reason_lines(reasons, [record.model_dump() for record in bad])
        raise DataError("\n".join(lines))
    notes = Notes()
    for one in done:
        for kind, (count, example) in one["warnings"].items():
            notes.add(kind, example, count)
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
        notes=dict(sum((Counter(one["notes"]) for one in done), Counter[str]())),
        warnings=(*warnings, *notes.lines()),
        shards=tuple(Shard(**s) for one in done for s in one["shards"]),
    )


def _split_message(spec: JobSpec, keep: Split, rows: int, done: Sequence[dict[str, Any]]) -> str:
    """Return why data.eval_fraction leaves one side without rows, and a value that does not."""
    lowest, highest = min(one["shares"][0] for one in done), max(one["shares"][1] for one in done)
    what = "none" if keep == "eval" else "all"
    text = (
        f"data.eval_fraction = {spec.data.eval_fraction:g} holds out {what} of the {rows:,} rows, "
        "each of which is drawn by a hash of its number and the seed."
    )
    fraction = _fraction_between(lowest, highest, near_lowest=keep == "eval")
    if fraction is None:
        return f"{text} Name more rows as data.train, or others as data.eval."
    return f"{text} Set data.eval_fraction={fraction:g}, or name other rows as data.eval."


def _fraction_between(lowest: float, highest: float, near_lowest: bool) -> float | None:
    """Return a short fraction above the lowest share and not above the highest, so that both sides have rows."""
    for scale in (10**digits for digits in range(1, 7)):
        below = math.floor(lowest * scale) + 1
        number = below if near_lowest else math.floor(highest * scale)
        if lowest < number / scale <= highest and number < scale:
            return number / scale
    return None


def _bad_rows_message(count: int, total: int, examples: Sequence[BadRowRecord]) -> str:
    lines = [f"{count} of {total} rows cannot be used:"]
    lines += [f"  {r.file}, row {r.row}: {r.why}" for r in examples]
    if count > len(examples):
        lines.append(f"  … and {count - len(examples)} more")
    lines.append(
        f"Fix them, or set data.on_bad_row=skip: they are then counted, and listed in {BAD_ROWS} beside the shards."
    )
    return "\n".join(lines)
