"""Set up a trial before its first step: checkpoint, writer, stream, model and engine. All collective."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.identity import check_base
from orchestrator.model.padding import set_tokens
from orchestrator.plan.plan import Plan
from orchestrator.run_folder import RunFolder
from orchestrator.train import engine as zero
from orchestrator.train.checkpoint import (
    CheckpointWriter,
    Committed,
    newest_valid,
    put_aside_newer,
    remove_uncommitted,
)
from orchestrator.train.data_loader import Source, StepStream, open_source
from orchestrator.train.group import broadcast, together
from orchestrator.train.metrics_logger import MetricsLogger
from orchestrator.train.reshard import load_resharded
from orchestrator.train.state import Progress
from orchestrator.train.worker_cache import WorkerCache


def find_checkpoint(folder: RunFolder, metrics_logger: MetricsLogger) -> Committed | None:
    """The newest valid checkpoint, verified by rank 0, the same on all ranks."""
    metrics_logger.event("find", workers=dist.get_world_size())
    found: Committed | None = None
    if dist.get_rank() == 0:
        remove_uncommitted(folder.checkpoints)
        found = newest_valid(
            folder.checkpoints, lambda text: metrics_logger.event("warning", text=text)
        )
        put_aside_newer(folder.checkpoints, found)
    return broadcast(found)


def progress_in(found: Committed) -> Progress:
    """Return the progress that a checkpoint holds.

    Raises CheckpointError where it is none of this version's, as in a marker of another one.
    """
    try:
        return Progress(**found.facts["progress"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{found.folder} was written by another version of orchestrator, or is damaged: {error}. "
            "Delete it to resume from the one before, or start over with --fresh."
        ) from error


def open_writer(
    plan: Plan, folder: RunFolder, best_step: int | None, on_commit: Callable[[Committed], None]
) -> CheckpointWriter:
    """Who writes this start's checkpoints; the one of `best_step` is kept."""
    writer = CheckpointWriter(
        folder.checkpoints,
        dist.get_rank(),
        dist.get_world_size(),
        keep=plan.spec.checkpoint.num_to_keep,
        attempt=broadcast(uuid.uuid4().hex[:6]),
        on_commit=on_commit,
        size_bytes=plan.checkpoint_bytes,
    )
    writer.best_step = best_step
    return writer


def open_stream(plan: Plan, step: int, metrics_logger: MetricsLogger) -> StepStream:
    """The training rows from optimizer step `step` on."""
    metrics_logger.event("stream", step=step)

    def source() -> Source | None:
        if dist.get_rank():
            return None
        return open_source(plan, plan.train_data, plan.global_batch_size, for_training=True)

    return StepStream(together(source), plan.global_batch_size, step, plan.total_steps)


def open_model(
    plan: Plan, warm: WorkerCache | None, metrics_logger: MetricsLogger
) -> torch.nn.Module:
    """The job's model, the same on all ranks; random numbers start anew behind it."""

    def make() -> torch.nn.Module:
        if plan.model.frozen and dist.get_rank() == 0:
            check_base(plan.spec, plan.base)
        try:
            return warm.model(plan) if warm else build_model(plan.spec, plan.labels)
        except SafetensorError as error:
            raise OrchestratorError(
                f"model.pretrained = {plan.spec.model.pretrained!r}: its weights are damaged ({error}). "
                "Copy or download them again."
            ) from error

    metrics_logger.event("model")
    zero.seed_everything(plan.spec.seed, dist.get_rank())
    model: Any = together(make)
    zero.seed_everything(plan.spec.seed, dist.get_rank())
    set_tokens(model, plan.pad_token_id, plan.target_start)
    return model


def load_state(engine: Any, plan: Plan, found: Committed, metrics_logger: MetricsLogger) -> None:
    """Restore what the checkpoint holds, whatever the number of workers that wrote it."""
    writers = found.facts["world_size"]
    metrics_logger.event("load", workers=writers)
    if plan.stage and writers != dist.get_world_size():
        load_resharded(engine, found.folder, plan.stage, writers)
    else:  # at stage 0 every rank has everything
        zero.load_shards(engine, found.folder)
    zero.load_random_state(found.folder, dist.get_rank(), plan.spec.seed, found.step)
