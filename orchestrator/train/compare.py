"""Teacher and student side by side: size, speed and quality on the evaluation rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.stream import unpack_rows
from orchestrator.model.causal import teacher_job
from orchestrator.model.teacher import load_teacher, teacher_source
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan.plan import Plan
from orchestrator.tasks.batches import ragged
from orchestrator.train.export import load_exported
from orchestrator.train.sample import rows_by_length

BATCH_ROWS = 32


def compare_with_teacher(plan: Plan, exported: Path) -> dict[str, Any]:
    """Both models over the same evaluation rows in the same batches, one after the other, in this process.

    Returns rows, batch_rows, device, and for `teacher` and `student` name, parameters, bytes,
    ms_per_row (forward pass and loss) and metrics (the task's).
    """
    assert plan.spec.distillation is not None
    assert plan.eval_data is not None
    limit = plan.spec.distillation.compare_rows
    reader, ids = rows_by_length(plan.eval_data, limit, plan.spec.seed)
    rows = unpack_rows(reader.take(ids))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(plan.spec, plan.labels, plan.pad_token_id)
    task = teacher_job(plan.spec).task  # it may need documents kept apart in another way
    theirs = plan.model_copy(update={"spec": plan.spec.model_copy(update={"task": task})})
    measured = _measured(theirs, teacher, rows, device)
    found = {"teacher": {"name": teacher_source(plan.spec), **measured}}
    del teacher
    student = load_exported(exported)[1]
    found["student"] = {"name": plan.spec.name, **_measured(plan, student, rows, device)}
    return {"rows": len(rows), "batch_rows": BATCH_ROWS, "device": str(device), **found}


def _measured(
    plan: Plan, model: Any, rows: list[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    task, seconds = plan.spec.task, 0.0
    model = model.to(device).eval()
    parts: list[dict[str, np.ndarray]] = []
    starts = range(0, len(rows), BATCH_ROWS)
    for start in (starts[-1], *starts):  # the longest rows first, to warm up, uncounted
        chunk = rows[start : start + BATCH_ROWS]
        batch = plan.collate(chunk, np.ones(len(chunk), np.float32))
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
    if task.needs_tokenizer:
        gathered = task.decode(gathered, load_tokenizer(plan.spec))
    metrics = task.metrics(gathered, plan.labels)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "ms_per_row": round(1000 * seconds / len(rows), 3),
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }
