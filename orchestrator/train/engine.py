"""The only place that touches DeepSpeed: open, step, save, load, close."""

from __future__ import annotations

import gc
import glob
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch._utils import _unflatten_dense_tensors as unflattened

from orchestrator.data.stream import StepRows, micro_batches
from orchestrator.plan.plan import Plan
from orchestrator.train.averaging import AVERAGED_FILE, Averager, add_l1
from orchestrator.train.objective import Objective
from orchestrator.train.optimizer import make_optimizer
from orchestrator.train.tensors import load_tensors
from orchestrator.train.unfreezing import Unfreezing, unfreezing_of

TAG = "engine"
"""Name of DeepSpeed's folder inside a checkpoint."""
LINEAR = functional.linear
"""torch's own. ZeRO 3 puts one in its place that saves memory, rounds another way, and stays when its engine goes."""


def import_ahead() -> None:
    """Import what an engine and its model need, and take it out of garbage collection.

    The libraries make 600,000 objects that live as long as the process: looking at them took 0.4 s of
    every full collection, in the middle of training and at the end of each trial.
    """
    import deepspeed  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    gc.freeze()


def open_engine(plan: Plan, model: torch.nn.Module) -> Any:
    """A DeepSpeed engine in the process group that Ray Train made.

    The CPU op `deepspeed_shm_comm` serves inference only, yet is compiled at start (about 35 s, and it
    needs ninja); hiding it from DeepSpeed changes no result.
    """
    import deepspeed
    import deepspeed.ops

    if not plan.on_gpu and not plan.optimizer_class.startswith("deepspeed"):
        deepspeed.ops.__compatible_ops__ = {}
    model.train()  # `from_pretrained` gives a model in evaluation mode: no dropout, no noise
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(plan, model),
        config=dict(plan.deepspeed),
        dist_init_required=False,
    )
    engine.unfreezing = unfreezing_of(plan, engine.module, engine.basic_optimizer)
    return engine


def after_each_step(engine: Any, plan: Plan) -> Averager | None:
    """Attach what the job's regularization does to the weights after each of the optimizer's steps."""
    settings = plan.spec.regularization
    if settings.l1:
        add_l1(engine.basic_optimizer, settings.l1)
    if not settings.averaging.keeps_average:
        return None
    return Averager(engine.basic_optimizer)


def set_learning_rate(engine: Any, plan: Plan, step: int, factor: float = 1.0) -> float:
    """Set the rate of optimizer step `step` (0-based) in every group; returns the plan's own, without parts.

    Layers that wait for their time get none. `factor`: what evaluations so far have left of the rate, under
    a plateau schedule.
    """
    lr = plan.learning_rate * plan.spec.schedule.lr_factor(step, plan.total_steps) * factor
    unfreezing: Unfreezing | None = engine.unfreezing
    if unfreezing:
        unfreezing.at_step(step)
    for group in engine.optimizer.param_groups:
        waits = unfreezing is not None and unfreezing.waits(group)
        group["lr"] = 0.0 if waits else lr * group["lr_scale"]
    return lr


def train_step(
    engine: Any, plan: Plan, batch: StepRows, objective: Objective
) -> tuple[float, float]:
    """Forward and backward over this rank's rows, then the update.

    Returns this rank's sums of what is minimized and of the task's own loss.

    Each micro-batch's loss sum is divided by the targets of the *global* batch. DeepSpeed divides by
    accumulation and averages over ranks, so both are multiplied back: the gradient is that of the
    global mean, however the batch is cut.
    """
    scale = dist.get_world_size() * plan.accumulation / max(batch.denominator, 1)
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for rows, weights in micro_batches(batch, plan.micro_batch_size):
        loss, task_loss = objective(engine, rows, weights)
        engine.backward(loss * scale)
        totals += torch.stack([loss.detach(), task_loss]).double()
        engine.step()
    minimized, own = totals.tolist()
    return minimized, own


def show_masters(engine: Any) -> None:
    """Copy the fp32 weights that the optimizer steps into the model, as after a step. Collective."""
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return  # they are the model's own
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()  # lets go of gathered weights, small ones too
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    else:  # bf16 without ZeRO: whole weights, or one flat piece per group for a fused optimizer
        flat = getattr(optimizer, "fp32_groups_flat", None)
        for i, group in enumerate(optimizer.fp16_groups):
            masters = optimizer.fp32_groups[i] if flat is None else unflattened(flat[i], group)
            for parameter, master in zip(group, masters, strict=True):
                parameter.data.copy_(master.data)


@contextmanager
def averaged(engine: Any, averager: Averager | None) -> Iterator[None]:
    """Inside, the model holds the averaged weights; without an averager, its own. Collective."""
    if averager is None:
        yield
        return
    averager.exchange()
    show_masters(engine)
    try:
        yield
    finally:
        averager.exchange()
        show_masters(engine)


def averaged_weights(engine: Any, averager: Averager | None) -> dict[str, torch.Tensor] | None:
    """Averages of the trainable weights by name, in the precision of the model, in host memory.

    None without an averager and on ranks other than 0. Collective.
    """
    if averager is None:
        return None
    with averaged(engine, averager):
        if engine.zero_optimization_stage() == 3:
            found: dict[str, torch.Tensor] | None = engine._zero3_consolidated_16bit_state_dict(
                True
            )
            return found
        if dist.get_rank():
            return None
        named = engine.module.named_parameters()
        return {n: p.detach().to("cpu", copy=True) for n, p in named if p.requires_grad}


def gradient_norm(engine: Any) -> float | None:
    """Global L2 norm of the last update's gradient before clipping, where DeepSpeed keeps it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def save_shards(engine: Any, folder: Path, rank: int, averager: Averager | None = None) -> None:
    """Write this rank's part of model, optimizer and random state below `folder`. Collective.

    With an averager rank 0 adds the averages in one piece, for export.

    Raises OSError where a file cannot be written, after every collective call has been made: a rank
    that left early would hang the others.
    """
    whole = averaged_weights(engine, averager)
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
    if whole is not None:
        try:
            torch.save(whole, folder / AVERAGED_FILE)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def load_shards(engine: Any, folder: Path) -> None:
    """Restore model and optimizer as `save_shards` wrote them at the same world size. Collective.

    Weight decay, betas and the like stay as the engine was opened with: a trial may go on from another's
    weights with settings of its own. Files that hold anything but values raise CheckpointError.
    """
    groups = engine.basic_optimizer.param_groups
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
    with _reading_safely(engine):
        engine.load_checkpoint(
            str(folder),
            tag=TAG,
            load_module_strict=not has_frozen(engine),
            load_lr_scheduler_states=False,
        )
    for group, settings in zip(engine.basic_optimizer.param_groups, own, strict=True):
        group.update(settings)


@contextmanager
def _reading_safely(engine: Any) -> Iterator[None]:
    """Have DeepSpeed 0.19 read values only, from a folder whose path may hold `[`, `*` or `?`.

    It unpickles whatever its files hold, and finds the files of the model by a pattern that holds the path.
    """
    find, load = engine._get_all_ckpt_names, engine.checkpoint_engine.load

    def find_literally(folder: str, tag: str) -> list[str]:
        found: list[str] = find(glob.escape(folder), tag)
        return found

    def load_values(path: str, map_location: Any = None) -> Any:
        return load_tensors(path, map_location)

    engine._get_all_ckpt_names, engine.checkpoint_engine.load = find_literally, load_values
    try:
        yield
    finally:
        engine._get_all_ckpt_names, engine.checkpoint_engine.load = find, load


def has_frozen(engine: Any) -> bool:
    """Whether some weights do not move; those are left out of checkpoints."""
    return any(not p.requires_grad for p in engine.module.parameters())


def load_random_state(folder: Path, rank: int, seed: int, step: int) -> None:
    """Restore this rank's random state; a rank that had none is seeded from (seed, step, rank)."""
    saved = folder / f"random-{rank:05d}.pt"
    if saved.exists():
        _set_random_state(load_tensors(saved))
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
    """Free what the engine holds, so that the next trial in this process starts clean.

    ZeRO 3's `destroy` leaves each parameter alive in autograd's C++ part, where Python's collector does
    not see it, with attributes that lead to the optimizer and the engine: the whole trial's memory.
    So the parameters are emptied and everything lets go of everything. What ZeRO 3 changed in torch is put back.
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    engine.destroy()
    for parameter in parameters:
        parameter.grad = None
        parameter.__dict__.clear()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    optimizer.__dict__.clear()
    engine.__dict__.clear()
    functional.linear = LINEAR
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
