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
    Block,
    Segment,
    StepRows,
    blocks_of_ranks,
    make_dataset,
    read_steps,
    segments,
)
from orchestrator.errors import DataError
from orchestrator.plan.plan import DataFacts, Plan

AHEAD_STEPS = 8
"""Steps held ready in each worker."""
CLOSE_S = 10.0
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


class StepStream:
    """This rank's rows for steps start…stop, read ahead from the moment it is made.

    Making and iterating are collective; rank 0 holds `source`, the others None. Rank 0 works out the
    order and tells each rank its blocks, which it then reads through a Ray Data set of its own. A
    thread reads ahead. From the first step on, two segments are known, so that the next one is warm
    before the present one ends.
    """

    def __init__(self, source: Source | None, global_rows: int, start: int, stop: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.source, self.global_rows = source, global_rows
        self._pending = segments(start, stop, global_rows, self.world_size)
        self._opened: queue.Queue[Any] = queue.Queue()
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()
        self._open_next()

    def __iter__(self) -> Iterator[StepRows]:
        first = True
        while (item := self._ready.get()) is not _END:
            match item:
                case StepRows():
                    yield item
                    if first:  # a start has no time to spare for a second segment
                        first = False
                        self._open_next()
                case BaseException():
                    raise item
                case _:  # a segment ended: all ranks are here at the same step
                    self._open_next()

    def close(self) -> None:
        """Stop reading ahead, and wait until nothing is held."""
        self._stopped.set()
        self._opened.put(_END)
        self._thread.join(CLOSE_S)

    def _open_next(self) -> None:
        if not self._pending:
            self._opened.put(_END)
            return
        segment = self._pending.pop(0)
        self._opened.put((segment, *self._my_blocks(segment)))

    def _my_blocks(self, segment: Segment) -> tuple[ShardReader, list[Block]]:
        """This rank's blocks of a segment, and where to read them."""
        told: list[Any] | None = None
        if self.source is not None:
            source = self.source
            told = [
                (source.reader, blocks)
                for blocks in blocks_of_ranks(
                    source.order, source.n_targets, segment, self.world_size
                )
            ]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, told, src=0)
        reader, blocks = mine[0]
        return reader, blocks

    def _read_ahead(self) -> None:
        per_step = rows_per_rank(self.global_rows, self.world_size)
        try:
            while (item := self._opened.get()) is not _END and not self._stopped.is_set():
                segment, reader, blocks = item
                dataset = make_dataset(reader, blocks)
                for step in read_steps(dataset, segment, self.rank, per_step):
                    if not self._put(step):
                        return
                self._put(segment)
            self._put(_END)
        except BaseException as error:  # noqa: BLE001, raised again in the training thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
