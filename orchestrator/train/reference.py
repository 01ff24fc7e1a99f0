"""What the untouched model says of each row, computed once, before the first step.

A reference that stays frozen says the same of a row in every epoch. So no second model is held while
training: not in full tuning, where it would be a copy, nor with adapters, where it is the base.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import PADDING
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import StepRows, unpack_rows
from orchestrator.errors import DataError
from orchestrator.plan.data import DataStats
from orchestrator.plan.plan import Plan
from orchestrator.run_folder import write_atomically
from orchestrator.train.group import broadcast


@dataclass(frozen=True)
class Reference:
    """Values by name, each (rows,) of a prepared split."""

    values: dict[str, np.ndarray]

    def joined(self, step: StepRows) -> StepRows:
        """The step's rows, each with its values; rows that only fill have any."""
        rows = [
            {**row, **{name: values[i] for name, values in self.values.items()}}
            for row, i in zip(
                step.rows, np.where(step.row_ids == PADDING, 0, step.row_ids), strict=True
            )
        ]
        return replace(step, rows=rows)


def find_reference(
    plan: Plan, data: DataStats, model: Any, device: torch.device, kept: Path
) -> Reference:
    """The reference of one split: read from `kept`, else computed with `model` and written there.

    Collective; every rank gets all values. `model` must be as it is before any training.
    """
    found = broadcast(_read(kept, data) if dist.get_rank() == 0 else None)
    if found is None:
        found = _computed(plan, data, model, device)
        if dist.get_rank() == 0:
            _write(kept, data, found)
    return Reference(found)


def _computed(
    plan: Plan, data: DataStats, model: Any, device: torch.device
) -> dict[str, np.ndarray]:
    """Each rank takes every w-th row, by length; all make equally many forward passes."""
    task, size = plan.spec.task, dist.get_world_size()
    manifest = read_manifest(Path(data.folder))
    if manifest is None:
        raise DataError(f"{data.folder}: prepared data is gone. Run `orchestrator prepare` again.")
    reader = open_shards(data.folder, manifest)
    by_length = np.argsort(reader.column("length"), kind="stable")
    filled = np.resize(by_length, -(-data.rows // size) * size)  # the first rows twice, at most
    mine = filled[dist.get_rank() :: size]
    was_training = model.training
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for start in range(0, len(mine), plan.micro_batch_size):
            ids = mine[start : start + plan.micro_batch_size]
            rows = unpack_rows(reader.take(ids))
            batch = plan.collate(rows, np.ones(len(rows), np.float32))
            tensors = {name: tensor.to(device) for name, tensor in batch.items()}
            parts.append({"row_id": ids, **task.reference(model, tensors)})
    model.train(was_training)
    return _gathered({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, data)


def _gathered(mine: dict[str, np.ndarray], data: DataStats) -> dict[str, np.ndarray]:
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, mine)
    out = {name: np.zeros(data.rows) for name in mine if name != "row_id"}
    for box in boxes:
        for name, values in out.items():
            values[box["row_id"]] = box[name]
    return out


def _read(kept: Path, data: DataStats) -> dict[str, np.ndarray] | None:
    """Return what an earlier start computed for the same prepared rows.

    None where there is nothing, or the file is damaged: then it is computed again.
    """
    try:
        with np.load(kept) as stored:
            if str(stored["prepared"]) != data.folder:
                return None
            return {name: stored[name] for name in stored.files if name != "prepared"}
    except (AttributeError, EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile):
        return None


def _write(kept: Path, data: DataStats, values: dict[str, np.ndarray]) -> None:
    buffer, arrays = io.BytesIO(), {"prepared": np.array(data.folder), **values}
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(kept, buffer.getvalue())
