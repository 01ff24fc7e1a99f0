"""Derive the part of a plan that follows from the number of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.data.order import rows_per_rank
from orchestrator.errors import PlanError
from orchestrator.plan.fit import Load, fit
from orchestrator.plan.memory import MemorySetup, Stage
from orchestrator.plan.resources import worker_limits
from orchestrator.plan.zero import deepspeed_config


def worker_plan(
    load: Load, reasons: dict[str, str], stage: Stage | None = None
) -> tuple[MemorySetup, dict[str, Any]]:
    """(how the model is held, the plan's fields that follow from the number of workers).

    Raises PlanError where a worker's share does not fit, or leaves mixup nothing to mix.
    """
    setup, micro_batch_size = fit(load, reasons, stage)
    if micro_batch_size == 1 and load.spec.regularization.mixup_alpha is not None:
        raise PlanError(
            "regularization.mixup_alpha mixes rows of one micro-batch, and a micro-batch has one row here: "
            f"batch.micro_batch_size is {load.spec.batch.micro_batch_size}, {load.rows} rows go to each worker. "
            "Raise batch.micro_batch_size or batch.global_batch_size, use fewer workers, or drop it."
        )
    accumulation = -(-load.rows // micro_batch_size)
    return setup, {
        "num_workers": load.workers.count,
        "stage": setup.stage,
        "rows_per_worker": load.rows,
        "micro_batch_size": micro_batch_size,
        "accumulation": accumulation,
        "memory_bytes": load.need(load.model, setup, micro_batch_size),
        "deepspeed": deepspeed_config(load.spec, setup, micro_batch_size, accumulation),
    }


def stage_of_min_workers(
    load: Load, global_batch_size: int, reasons: dict[str, str]
) -> Stage | None:
    """The ZeRO stage of a job whose number of workers changes: what fits the fewest fits more as well.

    None where the number is fixed. Raises PlanError where nothing fits the fewest.
    """
    fewest, most = worker_limits(load.spec, load.workers.count)
    if fewest == most:
        return None
    few = replace(
        load,
        workers=replace(load.workers, count=fewest),
        rows=rows_per_rank(global_batch_size, fewest),
    )
    try:
        setup, _ = fit(few, reasons)
    except PlanError as error:
        raise PlanError(f"with resources.num_workers.min = {fewest}: {error}") from error
    return setup.stage
