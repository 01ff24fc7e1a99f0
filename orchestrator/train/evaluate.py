"""Exact evaluation: every row once, for any world size and any remainder."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.data.order import PADDING
from orchestrator.data.stream import StepRows
from orchestrator.errors import DataError
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan.plan import Plan
from orchestrator.tasks.batches import ragged
from orchestrator.train.data_loader import StepStream, open_source
from orchestrator.train.reference import Reference

CACHE_BYTES = 256 * 2**20
"""Evaluation rows up to this size (all ranks together) are kept in memory after the first pass."""


class Evaluator:
    """Measures a model on the plan's evaluation rows, as often as asked. Every call is collective."""

    def __init__(
        self,
        plan: Plan,
        kept: dict[Any, list[StepRows]] | None = None,
        reference: Reference | None = None,
    ) -> None:
        """`kept`: rows of earlier trials in this worker, and where this one leaves its own.
        `reference`: what the untouched model says of them, where the task compares with it."""
        assert plan.eval_data is not None
        self.reference = reference
        self.plan, self.data = plan, plan.eval_data
        world_size = dist.get_world_size()
        self.global_batch_size = min(
            plan.micro_batch_size * world_size, max(self.data.rows, world_size)
        )
        self._kept = {} if kept is None else kept
        self._key = (self.data.folder, self.global_batch_size, world_size, plan.spec.seed)

    def __call__(self, model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
        """Metrics of `model`, the same on all ranks. The random state is left as it was."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                mine = self._measure(model, device)
        finally:
            model.train(was_training)
        return self._share(_gather(mine))

    def _measure(self, model: torch.nn.Module, device: torch.device) -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        for step in self._steps():
            step = self.reference.joined(step) if self.reference else step
            tensors = self.plan.collate(step.rows, step.weights)
            tensors = {name: t.to(device) for name, t in tensors.items()}
            measured = self.plan.spec.task.measure(model, tensors)
            for name in self.plan.spec.task.kept_features:
                measured[name] = ragged([row[name] for row in step.rows])
            real = step.row_ids != PADDING
            parts.append(
                {"row_id": step.row_ids[real], **{k: v[real] for k, v in measured.items()}}
            )
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _steps(self) -> Iterable[StepRows]:
        if self._key in self._kept:
            return self._kept[self._key]
        source = None
        if dist.get_rank() == 0:
            source = open_source(self.plan, self.data, self.global_batch_size, for_training=False)
        count = -(-self.data.rows // self.global_batch_size)
        steps = StepStream(source, self.global_batch_size, 0, count)
        if self.data.size_bytes > CACHE_BYTES:
            return steps
        self._kept.clear()  # one set at a time: trials that differ in it are few
        self._kept[self._key] = [_owned(step) for step in steps]
        return self._kept[self._key]

    def _share(self, gathered: dict[str, np.ndarray] | None) -> dict[str, Any]:
        """Metrics from rank 0 to all; an error there is raised on all."""
        shared: list[Any] = [None]
        if gathered is not None:
            shared = [self._metrics(gathered)]
        dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], Exception):
            raise shared[0]
        metrics: dict[str, Any] = shared[0]
        return metrics

    def _metrics(self, gathered: dict[str, np.ndarray]) -> dict[str, Any] | DataError:
        seen = np.sort(gathered.pop("row_id"))
        if not np.array_equal(seen, np.arange(self.data.rows)):
            return DataError(
                f"evaluation saw {len(seen)} rows, {len(np.unique(seen))} distinct, of {self.data.rows}: "
                "its figures would be wrong. Please report this."
            )
        task = self.plan.spec.task
        if task.needs_tokenizer:
            gathered = task.decode(gathered, self._tokenizer)
        return {**task.metrics(gathered, self.plan.labels), "rows": self.data.rows}

    @cached_property
    def _tokenizer(self) -> Any:
        """Only rank 0 needs it, and only for some tasks."""
        return load_tokenizer(self.plan.spec)


def _owned(step: StepRows) -> StepRows:
    """A copy that does not hold on to Ray's shared memory."""
    rows = [{name: deepcopy(value) for name, value in row.items()} for row in step.rows]
    return replace(step, rows=rows, weights=step.weights.copy(), row_ids=step.row_ids.copy())


def _gather(mine: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """All ranks' arrays joined, sorted by row, on rank 0; None elsewhere."""
    boxes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, boxes, dst=0)
    if boxes is None:
        return None
    joined = {k: np.concatenate([box[k] for box in boxes]) for k in mine}
    by_row = np.argsort(joined["row_id"], kind="stable")
    return {k: v[by_row] for k, v in joined.items()}
