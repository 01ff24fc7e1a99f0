"""A teacher's outputs for prepared rows: computed once, stored as shards beside the rows.

Columns, each a list per row: `teacher_logits` (targets × classes); for language models `teacher_tokens`
and `teacher_log_p` (targets × top_k), softened log probabilities; `teacher_hidden_N` (tokens × width) of the
teacher's layer N. Targets are those that count, in the order of `Scores`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data.commit import run_all, work_of
from orchestrator.data.manifest import Manifest, Shard, sha256_of
from orchestrator.data.shards import open_shards
from orchestrator.data.sources import find_files
from orchestrator.data.stream import unpack_rows
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.model.causal import teacher_job
from orchestrator.model.config import load_config
from orchestrator.model.identity import source_identity
from orchestrator.model.layers import LayerOutputs
from orchestrator.model.padding import padded_on, padding_id, padding_side
from orchestrator.model.teacher import (
    asked,
    check_teacher,
    load_teacher,
    paired_layers,
    teacher_source,
)
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.spec import JobSpec

SHARD_ROWS = 8192
"""Rows per shard: one piece of work."""
BATCH_ROWS = 256
"""Rows per record batch: what is held in memory at a time. Hidden states are large."""
SPARE_CPUS = 2
"""CPUs of a node that a teacher leaves alone."""
PREFIX = "teacher_"


def teacher_folder(spec: JobSpec, prepared: Manifest) -> Path:
    """Return the folder of a teacher's outputs, named by everything that they depend on."""
    settings = asked(spec)
    facts: dict[str, Any] = {
        "rows": prepared.fingerprint,
        "teacher": _fingerprint(spec),
        "layers": sorted({theirs for _, theirs in paired_layers(spec)}),
    }
    if spec.task.soft_targets == "tokens":  # the rest of the vocabulary is summed up when softened
        facts |= {"top_k": settings.top_k, "temperature": settings.temperature}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(spec.data.prepared_dir).absolute() / f"{prepared.fingerprint}-teacher-{digest}"


def _fingerprint(spec: JobSpec) -> list[str]:
    """Changes when the teacher does: digests of its files, or the hub id and revision."""
    folder = Path(teacher_source(spec))
    if not folder.is_dir():
        revision = asked(spec).revision
        return [f"{folder}@{source_identity(str(folder), revision).commit or revision or 'main'}"]
    names = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return [_digest(str(name), name.stat().st_mtime_ns) for name in sorted(names)]


@lru_cache(maxsize=64)
def _digest(path: str, written: int) -> str:
    """Of a file's content; asked for again by each trial of a sweep."""
    return find_files(path, "text")[0].digest


@dataclass(frozen=True)
class TeacherWork:
    """One task: ask about rows `start`…`stop` of a prepared set, and write a shard into `target`."""

    spec: JobSpec
    folder: str
    prepared: Manifest
    start: int
    stop: int
    target: str
    threads: int


def ask_teacher(
    spec: JobSpec, folder: Path, prepared: Manifest, fingerprint: str, target: Path
) -> Manifest:
    """Write the teacher's outputs of all rows of a prepared set into `target`; returns their manifest.

    Needs a running Ray. Raises OrchestratorError where the teacher does not fit the job, DataError where
    it says something that is no number.
    """
    check_teacher(spec, prepared.labels)
    starts = range(0, prepared.rows, SHARD_ROWS)
    threads, how = _share(len(starts))
    work = [
        TeacherWork(
            spec, str(folder), prepared, i, min(i + SHARD_ROWS, prepared.rows), str(target), threads
        )
        for i in starts
    ]
    done = run_all(work, AskTeacher, **how)
    return prepared.model_copy(
        update={
            "fingerprint": fingerprint,
            "inputs": (str(folder), teacher_source(spec)),
            "features": done[0]["features"],
            "shards": tuple(Shard(**one["shard"]) for one in done),
            "batch_rows": BATCH_ROWS,
        }
    )


def _share(pieces: int) -> tuple[int, dict[str, Any]]:
    """(threads of a teacher, options of Ray Data's `map`): one teacher per GPU, or per node where there are none.

    It asks Ray for one CPU only: beside a running sweep, more might never be free.
    """
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    threads = max(1, int(min(n["CPU"] for n in nodes)) - SPARE_CPUS)
    gpus = int(sum(n.get("GPU", 0) for n in nodes))
    pool = ray.data.ActorPoolStrategy(size=min(pieces, gpus or len(nodes)))
    return threads, {"compute": pool, **({"num_gpus": 1} if gpus else {"num_cpus": 1})}


class AskTeacher:
    """One worker process: loads the teacher with its first piece, and keeps it."""

    def __init__(self) -> None:
        self.teacher: Teacher | None = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        work: TeacherWork = work_of(item)
        if self.teacher is None:
            import torch

            torch.set_num_threads(work.threads)
            self.teacher = Teacher(work.spec, work.prepared.labels)
        return {"out": json.dumps(_write_shard(self.teacher, work))}


class Teacher:
    """The teacher's answers to rows."""

    def __init__(self, spec: JobSpec, labels: tuple[str, ...]) -> None:
        import torch

        taught = teacher_job(spec)
        self.spec, self.task, self.settings = spec, taught.task, asked(spec)
        self.pad_token_id = padding_id(spec, labels, load_tokenizer(spec))
        self.padding_side, _ = padding_side(taught, labels)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_teacher(spec, labels, self.pad_token_id).to(self.device)
        layers = sorted({theirs for _, theirs in paired_layers(spec)})
        self.outputs = LayerOutputs(self.model, layers, "distillation.hidden")
        self.vocabulary = int(getattr(load_config(spec, labels).get_text_config(), "vocab_size", 0))

    def says(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[np.ndarray]]:
        """Per column an array for each row."""
        import torch

        weights = np.ones(len(rows), np.float32)
        batch = self.task.collate(rows, weights, self.pad_token_id)
        batch = padded_on(batch, self.padding_side)
        with torch.no_grad():
            scores = self.task.scores(self.model, {k: v.to(self.device) for k, v in batch.items()})
        counts = scores.weights.view(len(rows), -1).gt(0).sum(1).tolist()
        edges = np.cumsum(counts)[:-1]
        of_targets = self._of_targets(scores.logits[scores.weights > 0])
        said = {
            name: [part.ravel() for part in np.split(values, edges)]
            for name, values in of_targets.items()
        }
        for layer, states in self.outputs.states.items():
            of_rows = states.to(torch.float16).cpu().numpy()
            said[f"{PREFIX}hidden_{layer}"] = [
                states[: len(row["input_ids"])].ravel()
                for row, states in zip(rows, of_rows, strict=True)
            ]
        for name, arrays in said.items():
            if not all(np.isfinite(array).all() for array in arrays):
                raise DataError(f"distillation.teacher: its {name} are not all finite numbers")
        return said

    def _of_targets(self, logits: Any) -> dict[str, np.ndarray]:
        """Of logits (targets, classes)."""
        import torch

        if self.task.soft_targets != "tokens":
            return {f"{PREFIX}logits": logits.cpu().numpy()}
        log_p = torch.log_softmax(logits[:, : self.vocabulary] / self.settings.temperature, dim=-1)
        top = log_p.topk(min(self.settings.top_k, log_p.shape[-1]), dim=-1)
        return {
            f"{PREFIX}tokens": top.indices.to(torch.int32).cpu().numpy(),
            f"{PREFIX}log_p": top.values.cpu().numpy(),
        }


def _write_shard(teacher: Teacher, work: TeacherWork) -> dict[str, Any]:
    """Returns the shard and the kinds of its columns, JSON-ready."""
    name = f"shard-{work.start:012d}.arrow"
    path = Path(work.target) / name
    schema: Any = None
    with open(path, "wb") as handle:
        writer: Any = None
        for batch in _batches(teacher, work):
            if writer is None:
                schema, writer = batch.schema, pa.ipc.new_file(handle, batch.schema)
            writer.write_batch(batch)
        writer.close()
        handle.flush()
        os.fsync(handle.fileno())
    rows = work.stop - work.start
    shard = Shard(file=name, rows=rows, size_bytes=path.stat().st_size, sha256=sha256_of(path))
    features = {field.name: str(field.type) for field in schema}
    return {"shard": shard.model_dump(), "features": features}


def _batches(teacher: Teacher, work: TeacherWork) -> Iterator[pa.RecordBatch]:
    """Record batches of rows in their order; inside one, rows of similar length are asked about together."""
    reader = open_shards(work.folder, work.prepared)
    size = asked(work.spec).teacher_rows
    for start in range(work.start, work.stop, BATCH_ROWS):
        table = reader.take(np.arange(start, min(start + BATCH_ROWS, work.stop)))
        rows = unpack_rows(table)
        by_length = np.argsort(table.column("length").to_numpy(), kind="stable")
        said: list[dict[str, np.ndarray]] = [{} for _ in rows]
        for first in range(0, len(rows), size):
            chosen = by_length[first : first + size]
            for name, arrays in teacher.says([rows[i] for i in chosen]).items():
                for i, array in zip(chosen, arrays, strict=True):
                    said[i][name] = array
        yield pa.RecordBatch.from_pydict({n: _lists([one[n] for one in said]) for n in said[0]})


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Arrays of one type as an Arrow column of lists."""
    ends = np.cumsum([0, *(len(array) for array in arrays)])
    if ends[-1] >= 2**31:
        raise OrchestratorError(
            f"distillation.hidden: {len(arrays)} rows have {ends[-1]:,} values, more than a column can hold. "
            "Choose fewer layers, or a shorter data.max_length_tokens."
        )
    return pa.ListArray.from_arrays(
        pa.array(ends.astype(np.int32)), pa.array(np.concatenate(arrays))
    )
