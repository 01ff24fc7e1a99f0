"""Rows per step, and at which steps a run evaluates, saves and ends."""

from __future__ import annotations

import math

from orchestrator.data.prepare import Prepared, Split
from orchestrator.spec import JobSpec


def global_rows_of(spec: JobSpec, rows: int, reasons: dict[str, str]) -> int:
    """Rows of one optimizer step."""
    if spec.batch.global_batch_size != "auto":
        return spec.batch.global_batch_size
    usual = spec.task.default_global_batch_size
    reasons["global_batch_size"] = (
        f"default: {usual} ({spec.task.default_global_batch_size_source})"
        if rows >= usual
        else f"the data has {rows} rows"
    )
    return min(usual, rows)


def total_steps(spec: JobSpec, steps_per_epoch: int, reasons: dict[str, str]) -> int:
    """Optimizer steps of the whole run, by whichever limit comes first."""
    stop = spec.stop
    epochs = stop.max_epochs
    if epochs is None and stop.max_steps is None:
        epochs = 1.0
        reasons["total_steps"] = (
            "default: one epoch, and no more than a start; Devlin et al., arXiv 1810.04805, A.3, took 2 to 4"
        )
    by_epochs = math.ceil(epochs * steps_per_epoch) if epochs is not None else None
    limits = [n for n in (by_epochs, stop.max_steps) if n is not None]
    if len(limits) == 2:
        which = "stop.max_steps" if limits[1] <= limits[0] else "stop.max_epochs"
        reasons["total_steps"] = f"{which} comes first"
    return max(1, min(limits))


def eval_every_steps(
    spec: JobSpec,
    prepared: dict[Split, Prepared],
    per_epoch: int,
    total: int,
    reasons: dict[str, str],
) -> int:
    """Steps between evaluations; 0 where there is nothing to evaluate on."""
    if "eval" not in prepared:
        reasons["eval_every_steps"] = "no data.eval and no data.eval_fraction"
        return 0
    match spec.evaluation.every_steps:
        case "epoch":
            reasons["eval_every_steps"] = "once per epoch"
            return min(per_epoch, total)
        case "end":
            return total
        case steps:
            return min(steps, total)


def checkpoint_every_steps(spec: JobSpec, total: int, reasons: dict[str, str]) -> int:
    """Steps between checkpoints that nothing else asks for."""
    if spec.checkpoint.every_steps != "auto":
        return min(spec.checkpoint.every_steps, total)
    reasons["checkpoint_every_steps"] = "ten over the run, at least 20 steps apart"
    return min(total, max(20, math.ceil(total / 10)))


def group_by_length(spec: JobSpec, reasons: dict[str, str]) -> bool:
    """Tell whether rows of like lengths share a micro-batch."""
    wanted = spec.data.order.group_by_length
    if wanted != "auto":
        return wanted
    if spec.data.order.shuffle == "none":
        reasons["group_by_length"] = (
            "data.order.shuffle is none: rows stay in the order of the files"
        )
        return False
    packed = spec.task.fixed_length and getattr(spec.task, "packing", True)
    reasons["group_by_length"] = "all rows have one length" if packed else "less padding"
    return not packed
