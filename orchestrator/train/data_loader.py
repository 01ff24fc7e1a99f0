"""Load each rank's rows, step after step, from Ray Data prefetch windows that open ahead of need."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
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
    blocks_of_ranks,
    read_by_ray,
    read_here,
    read_steps,
    segments,
)
from orchestrator.errors import DataError
from orchestrator.plan.data import DataStats
from orchestrator.plan.plan import Plan

AHEAD_STEPS = 8
"""Steps held ready in each worker."""
CLOSE_S, CLOSE_POLL_S = 10.0, 0.01
_END = object()


class Source:
    """One prepared split: its shards, order and targets per row."""

    def __init__(self, reader: ShardReader, order: Order, n_targets: np.ndarray) -> None:
        self.reader, self.order, self.n_targets = reader, order, n_targets


def open_source(plan: Plan, data: DataStats, global_batch_size: int, for_training: bool) -> Source:
    """Open a prepared split and fix its order.

    Evaluation keeps the order of files but groups by length: every row counts once, in any order.
    """
    manifest = read_manifest(Path(data.folder))
    if manifest is None:
        raise DataError(f"{data.folder}: prepared data is gone. Run `orchestrator prepare` again.")
    reader = open_shards(data.folder, manifest, _teacher(data))
    grouped = plan.group_by_length or not for_training
    order = Order(
        shard_rows=tuple(s.rows for s in manifest.shards),
        global_batch_size=global_batch_size,
        seed=plan.spec.seed,
        shuffle=plan.spec.data.order.shuffle if for_training else "none",
        window_rows=plan.spec.data.order.window_rows,
        lengths=reader.column("length") if grouped else None,
    )
    return Source(reader, order, reader.column("n_targets"))


def _teacher(data: DataStats) -> ShardReader | None:
    """What a teacher said of the rows, to be read along with them."""
    if data.teacher_folder is None:
        return None
    manifest = read_manifest(Path(data.teacher_folder))
    if manifest is None:
        raise DataError(f"{data.teacher_folder}: what the teacher said is gone. Run prepare again.")
    return open_shards(data.teacher_folder, manifest)


class StepStream:
    """This rank's rows for steps start…stop, read ahead from the moment it is made.

    Making and iterating are collective; rank 0 holds `source`, the others None. Rank 0 works out the
    order and tells each rank its blocks. The first segment each rank reads itself; the others are read
    by a Ray Data set of its own, opened while the segment before is used. From the first step on, two
    segments are known.
    """

    def __init__(
        self, source: Source | None, global_batch_size: int, start: int, stop: int
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.source, self.global_batch_size = source, global_batch_size
        self._pending: list[Segment] = []
        if source is not None:
            row_bytes = source.reader.row_bytes
            self._pending = segments(start, stop, global_batch_size, self.world_size, row_bytes)
        self._first = start
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
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(CLOSE_POLL_S)

    def _open_next(self) -> None:
        """Rank 0 tells every rank its blocks of the next segment, and where to read them."""
        told: list[Any] = [None] * self.world_size  # no further segment
        if self.source is not None and self._pending:
            source, segment = self.source, self._pending.pop(0)
            ranks = blocks_of_ranks(source.order, source.n_targets, segment, self.world_size)
            told = [(segment, source.reader, blocks) for blocks in ranks]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, told if self.rank == 0 else None, src=0)
        self._opened.put(mine[0] or _END)

    def _read_ahead(self) -> None:
        per_step = rows_per_rank(self.global_batch_size, self.world_size)
        try:
            opened = self._start(self._opened.get())
            while opened is not _END and not self._stopped.is_set():
                segment, tables = opened
                half, following = sum(segment) // 2, None
                for step in read_steps(tables, segment, self.rank, per_step):
                    if not self._put(step):
                        return
                    if following is None and step.step >= half:
                        following = self._start_if_known()
                self._put(segment)
                opened = following or self._start(self._opened.get())
            self._put(_END)
        except BaseException as error:  # noqa: BLE001, raised again in the training thread
            self._put(error)

    def _start_if_known(self) -> Any:
        try:
            return self._start(self._opened.get_nowait())
        except queue.Empty:
            return None

    def _start(self, told: Any) -> Any:
        """Start reading a segment: (its steps, its tables to come)."""
        if told is _END:
            return _END
        segment, reader, blocks = told
        read = read_here if segment[0] == self._first else read_by_ray
        return segment, read(reader, blocks)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
