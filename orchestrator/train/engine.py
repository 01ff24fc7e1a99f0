"""The only place that touches DeepSpeed: open, step, save, load, close."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.data.stream import StepRows, micro_batches
from orchestrator.plan.plan import Plan
from orchestrator.plan.schedule import lr_factor
from orchestrator.train.optimizer import make_optimizer

TAG = "engine"
"""Name of DeepSpeed's folder inside a checkpoint."""


def open_engine(plan: Plan, model: torch.nn.Module) -> Any:
    """A DeepSpeed engine in the process group that Ray Train made.

    The CPU op `deepspeed_shm_comm` serves inference only, yet is compiled at start (about 35 s, and it
    needs ninja); hiding it from DeepSpeed changes no result.
    """
    import deepspeed
    import deepspeed.ops

    if not plan.on_gpu and not plan.optimizer_class.startswith("deepspeed"):
        deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(plan, model),
        config=dict(plan.deepspeed),
        dist_init_required=False,
    )
    return engine


def set_learning_rate(engine: Any, plan: Plan, step: int, factor: float = 1.0) -> float:
    """Set the rate of optimizer step `step` (0-based) in every group; returns that of `optimizer.lr`.

    `factor`: what evaluations so far have left of it, under a plateau schedule.
    """
    lr = plan.spec.optimizer.lr * lr_factor(plan.spec.schedule, step, plan.total_steps) * factor
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def train_step(engine: Any, plan: Plan, batch: StepRows) -> float:
    """Forward and backward over this rank's rows, then the update; returns the rank's loss sum.

    Each micro-batch's loss sum is divided by the targets of the *global* batch. DeepSpeed divides by
    accumulation and averages over ranks, so both are multiplied back: the gradient is that of the
    global mean, however the batch is cut.
    """
    scale = dist.get_world_size() * plan.accumulation / max(batch.denominator, 1)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for rows, weights in micro_batches(batch, plan.micro_rows):
        tensors = plan.spec.task.collate(rows, weights, plan.pad_token_id)
        tensors = {name: t.to(engine.device) for name, t in tensors.items()}
        loss = plan.spec.task.loss_sum(engine, tensors)
        engine.backward(loss * scale)
        total += loss.detach().double()
        engine.step()
    return float(total)


def gradient_norm(engine: Any) -> float | None:
    """Global L2 norm of the last update's gradient before clipping, where DeepSpeed keeps it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def save_shards(engine: Any, folder: Path, rank: int) -> None:
    """Write this rank's part of model, optimizer and random state below `folder`. Collective.

    Raises OSError where a file cannot be written, after every collective call has been made: a rank
    that left early would hang the others.
    """
    errors: list[Exception] = []
    write = engine.checkpoint_engine.save

    def write_or_remember(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            errors.append(error)

    engine.checkpoint_engine.save = write_or_remember
    try:
        engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=has_frozen(engine)
        )
    finally:
        engine.checkpoint_engine.save = write
    if errors:
        raise OSError(str(errors[0]).splitlines()[0]) from errors[0]
    torch.save(_random_state(), folder / f"random-{rank:05d}.pt")


def load_shards(engine: Any, folder: Path) -> None:
    """Restore model and optimizer as `save_shards` wrote them at the same world size. Collective.

    DeepSpeed unpickles its own files; they were verified against the checksums of the commit first.
    """
    engine.load_checkpoint(
        str(folder),
        tag=TAG,
        load_module_strict=not has_frozen(engine),
        load_lr_scheduler_states=False,
    )


def has_frozen(engine: Any) -> bool:
    """Whether some weights do not move; those are left out of checkpoints."""
    return any(not p.requires_grad for p in engine.module.parameters())


def load_random_state(folder: Path, rank: int, seed: int, step: int) -> None:
    """Restore this rank's random state; a rank that had none is seeded from (seed, step, rank)."""
    saved = folder / f"random-{rank:05d}.pt"
    if saved.exists():
        _set_random_state(torch.load(saved, weights_only=False))
    else:
        seed_everything(seed, rank, step)


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator; ranks differ, so that their dropout does."""
    mixed = (seed * 1_000_003 + step * 10_007 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _random_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def close_engine(engine: Any) -> None:
    """Free what the engine holds, so that the next trial in this process starts clean."""
    engine.destroy()
    engine.optimizer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
