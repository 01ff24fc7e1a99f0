"""Where a trial stands, how it ended, and what its ranks tell each other."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from orchestrator.plan.plan import Plan

Status = Literal["finished", "pruned", "stopped", "diverged", "storage_failed", "failed"]
Judge = Callable[[dict[str, Any], bool], tuple[bool, bool]]
"""Told by rank 0 alone of each evaluation and whether it is the last; answers (whether to go on, whether
to save a checkpoint)."""


@dataclass
class Progress:
    """Where a trial stands; saved with every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0
    best: dict[str, Any] | None = None
    last_eval: dict[str, Any] | None = None
    skipped_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """Step, metrics and mean training loss of every evaluation; what stops a run or lowers the rate
    is a pure function of it."""
    loss_sum: float = 0.0
    """Training loss since the last evaluation, and over how many targets."""
    targets: int = 0
    first_loss: float = math.inf
    """Training loss of the first step."""


@dataclass(frozen=True)
class Result:
    """How a trial ended. `message` says what happened and what to do, where it did not finish."""

    status: Status
    step: int
    best: dict[str, Any] | None
    last_eval: dict[str, Any] | None
    message: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def is_better(value: float, best: dict[str, Any] | None, plan: Plan) -> bool:
    """Whether `value` of the plan's metric beats the best so far; what is not finite never does."""
    return plan.selection_metric.is_better(value, best[plan.metric] if best else None)


@dataclass(frozen=True)
class Pulse:
    """What a rank has to say after a step, and, summed, what all know."""

    loss_sum: float
    task_loss_sum: float
    """The task's own loss, where regularization adds to what is minimized."""
    tokens: int
    elapsed_s: float
    """By rank 0's clock, so that all ranks call it time at the same step."""
    stop: bool
    handover: bool
    storage_failed: bool
    ask: bool
    """Time to ask the cluster whether it takes a node away."""
    leave: bool
    """It does, and soon."""


def summed(mine: Pulse, device: torch.device) -> Pulse:
    """Figures added up over ranks; a reason to stop is one wherever any rank has it. Collective."""
    figures = torch.tensor(astuple(mine), dtype=torch.float64, device=device)
    dist.all_reduce(figures)
    loss_sum, task_loss_sum, tokens, elapsed_s, *flags = figures.tolist()
    return Pulse(loss_sum, task_loss_sum, int(tokens), elapsed_s, *(flag > 0 for flag in flags))


def memory_in_use_bytes(device: torch.device) -> int:
    """Memory in use now: the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with open("/proc/self/statm", encoding="ascii") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes(device: torch.device) -> int:
    """The largest of all ranks' peaks."""
    if device.type == "cuda":
        mine = torch.cuda.max_memory_allocated(device)
    else:
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figure = torch.tensor(mine, dtype=torch.int64, device=device)
    dist.all_reduce(figure, op=dist.ReduceOp.MAX)
    return int(figure)
