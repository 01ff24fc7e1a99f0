"""Each rank's rows, step after step: Ray Data segments opened ahead of need."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import Order, rows_per_rank
from orchestrator.data.shards import ShardReader, open_shards
from orchestrator.data.stream import (
    Segment,
    StepRows,
    make_dataset,
    read_steps,
    segments,
    split_for_workers,
)
from orchestrator.errors import DataError
from orchestrator.plan.plan import DataFacts, Plan

AHEAD_STEPS = 8
"""Steps held ready in each worker."""
_END = object()


class Source:
    """One prepared split: its shards, order and targets per row."""

    def __init__(self, reader: ShardReader, order: Order, n_targets: np.ndarray) -> None:
        self.reader, self.order, self.n_targets = reader, order, n_targets


def open_source(plan: Plan, data: DataFacts, global_rows: int, for_training: bool) -> Source:
    """Open a prepared split and fix its order.

    Evaluation keeps the order of files but groups by length: every row counts once, in any order.
    """
    manifest = read_manifest(Path(data.folder))
    if manifest is None:
        raise DataError(f"{data.folder}: prepared data is gone. Run `orchestrator prepare` again.")
    reader = open_shards(data.folder, manifest)
    grouped = plan.group_by_length or not for_training
    order = Order(
        shard_rows=tuple(s.rows for s in manifest.shards),
        global_rows=global_rows,
        seed=plan.spec.seed,
        shuffle=plan.spec.data.order.shuffle if for_training else "none",
        window_rows=plan.spec.data.order.window_rows,
        lengths=reader.column("length") if grouped else None,
    )
    return Source(reader, order, reader.column("n_targets"))


def stream_steps(
    source: Source | None, global_rows: int, start: int, stop: int
) -> Iterator[StepRows]:
    """This rank's rows for steps start…stop. Collective: every rank iterates, rank 0 holds `source`.

    Rank 0 makes the Ray Data sets and hands out their iterators. A thread reads ahead, and two
    segments are open at any time, so that the next one is warm before the present one ends.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pending = segments(start, stop, global_rows, world_size)
    opened: queue.Queue[Any] = queue.Queue()
    ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD_STEPS)
    stopped = threading.Event()

    def open_next() -> None:
        if pending:
            segment = pending.pop(0)
            opened.put((segment, _iterator(source, segment, rank, world_size)))
        else:
            opened.put(_END)

    def read_ahead() -> None:
        per_step = rows_per_rank(global_rows, world_size)
        try:
            while (item := opened.get()) is not _END and not stopped.is_set():
                segment, iterator = item
                for step in read_steps(iterator, segment, rank, per_step):
                    if not _put(ready, step, stopped):
                        return
                _put(ready, segment, stopped)
            _put(ready, _END, stopped)
        except BaseException as error:  # noqa: BLE001, raised again in the training thread
            _put(ready, error, stopped)

    reader = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
    reader.start()
    try:
        open_next()
        open_next()
        while (item := ready.get()) is not _END:
            match item:
                case StepRows():
                    yield item
                case BaseException():
                    raise item
                case _:  # a segment ended: all ranks are here at the same step
                    open_next()
    finally:
        stopped.set()
        opened.put(_END)


def _put(ready: queue.Queue[Any], item: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _iterator(source: Source | None, segment: Segment, rank: int, world_size: int) -> Any:
    """This rank's iterator over a segment; rank 0 makes all of them."""
    made: list[Any] = [None]
    if rank == 0:
        assert source is not None
        dataset = make_dataset(source.reader, source.order, source.n_targets, segment, world_size)
        made = [split_for_workers(dataset, world_size)]
    dist.broadcast_object_list(made, src=0)
    return made[0][rank]
