"""Small collectives: what one rank knows, all know; what fails on one, fails on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from orchestrator.errors import OrchestratorError

T = TypeVar("T")


def broadcast(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; an OrchestratorError on any rank is raised on all.

    Without this the other ranks would wait in their next collective for one that has left.
    """
    result: T | None = None
    problem: OrchestratorError | None = None
    try:
        result = work()
    except OrchestratorError as error:
        problem = error
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]
