"""Teacher and student side by side: size, speed and quality on the evaluation rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import Order
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.model.teacher import load_teacher, teacher_source
from orchestrator.plan.plan import Plan
from orchestrator.tasks.base import ragged
from orchestrator.train.export import load_exported

BATCH_ROWS = 32


def compare_with_teacher(plan: Plan, exported: Path) -> dict[str, Any]:
    """Both models over the same evaluation rows in the same batches, one after the other, in this process.

    Returns rows, batch_rows, device, and for `teacher` and `student` name, parameters, bytes,
    ms_per_row (forward pass and loss) and metrics (the task's).
    """
    assert plan.spec.distillation is not None
    rows = _rows(plan, plan.spec.distillation.compare_rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(plan.spec, plan.labels, plan.pad_token_id)
    found = {
        "teacher": {"name": teacher_source(plan.spec), **_measured(plan, teacher, rows, device)}
    }
    del teacher
    student = load_exported(exported)[1]
    found["student"] = {"name": plan.spec.name, **_measured(plan, student, rows, device)}
    return {"rows": len(rows), "batch_rows": BATCH_ROWS, "device": str(device), **found}


def _rows(plan: Plan, limit: int | None) -> list[dict[str, Any]]:
    """Evaluation rows by length: all, or `limit` of them drawn by the job's seed."""
    data = plan.eval_data
    assert data is not None
    manifest = read_manifest(Path(data.folder))
    assert manifest is not None
    reader = open_shards(data.folder, manifest)
    ids = np.arange(data.rows)
    if limit is not None and limit < data.rows:
        ids = Order((data.rows,), limit, plan.spec.seed, "full").batch(0)
    ids = ids[np.argsort(reader.column("length")[ids], kind="stable")]
    return unpack_rows(reader.take(ids))


def _measured(
    plan: Plan, model: Any, rows: list[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    task, seconds = plan.spec.task, 0.0
    model = model.to(device).eval()
    parts: list[dict[str, np.ndarray]] = []
    starts = range(0, len(rows), BATCH_ROWS)
    for start in (starts[-1], *starts):  # the longest rows first, to warm up, uncounted
        chunk = rows[start : start + BATCH_ROWS]
        batch = task.collate(chunk, np.ones(len(chunk), np.float32), plan.pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        began = time.perf_counter()
        with torch.no_grad():
            measured = task.measure(model, batch)  # ends in host memory: nothing is still running
        seconds += time.perf_counter() - began
        for name in task.kept_features:
            measured[name] = ragged([row[name] for row in chunk])
        parts.append(measured)
        if len(parts) == 1:
            seconds = 0.0
    gathered = {name: np.concatenate([part[name] for part in parts[1:]]) for name in parts[0]}
    metrics = task.metrics(gathered, plan.labels)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "ms_per_row": round(1000 * seconds / len(rows), 3),
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }
