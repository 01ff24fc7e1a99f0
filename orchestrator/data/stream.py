"""Prepared rows → each worker, through Ray Data, in exactly the order that `order` says.

One block holds one rank's rows for a run of consecutive steps. Each rank runs a Ray Data set of its
own blocks, in order: no coordinator stands between the ranks, whose process would have to start, and
could die, beside them. The first blocks of a start the rank reads itself, so that no start, restart or
trial of a sweep waits for Ray Data's processes. Every row carries its step and rank, and the worker
checks both.

See docs/decisions/0019-every-rank-runs-its-own-ray-data-dataset.md.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data.order import PADDING, Order, rows_per_rank
from orchestrator.data.shards import ShardReader
from orchestrator.errors import DataError

BLOCK_ROWS = 256
"""Rows per block, about: enough to hide a task's cost, few enough that the first comes at once."""
FIRST_BLOCKS = 2
"""Blocks that each rank reads itself before Ray Data takes over: it opens while they are used."""
SEGMENT_BLOCKS = 1024
"""Most blocks, of all ranks together, in one segment: rank 0 lists them."""
SEGMENT_BYTES = 64 * 2**20
"""Most bytes of one rank's segment. All of it may wait in the object store, and the next one's beside it."""
READ_CPUS = 0.5
"""CPUs a read task asks Ray for; the plan keeps room for them beside the workers."""
RETRY_S = 2.0
"""How long a rank waits for a block of Ray Data's before it reads it itself."""
READ_TASKS = 1
"""Read tasks of one rank at a time. A second process would cost a start more than it reads."""


POSITION = ("row_id", "step", "rank", "denominator")
"""Columns that say where a row of a block belongs."""
COUNTS = ("length", "n_targets")
"""Columns of prepared shards that are no features."""


@dataclass(frozen=True)
class StepRows:
    """One rank's share of one global batch.

    `rows`: feature arrays per row. `weights` (rows,): 0 where a row only fills. `denominator`: targets
    in the whole global batch, over all ranks. `row_ids` (rows,): global row ids. `tokens`: those of
    rows that count.
    """

    step: int
    rows: list[dict[str, np.ndarray]]
    weights: np.ndarray
    row_ids: np.ndarray
    denominator: int
    tokens: int


Segment = tuple[int, int]
"""Steps from…to (exclusive) that one Ray Data set serves."""


def segments(
    start: int, stop: int, global_batch_size: int, world_size: int, row_bytes: int = 0
) -> list[Segment]:
    """Cut steps start..stop into segments. The first is short: it is what each rank reads itself."""
    per_block = steps_per_block(global_batch_size, world_size)
    block_bytes = per_block * rows_per_rank(global_batch_size, world_size) * row_bytes
    most = max(1, min(SEGMENT_BLOCKS // world_size, SEGMENT_BYTES // max(block_bytes, 1)))
    out: list[Segment] = []
    while start < stop:
        end = min(start + per_block * (most if out else FIRST_BLOCKS), stop)
        out.append((start, end))
        start = end
    return out


def steps_per_block(global_batch_size: int, world_size: int) -> int:
    """Steps whose rows share one block."""
    return max(1, BLOCK_ROWS // rows_per_rank(global_batch_size, world_size))


def _with_position(
    reader: ShardReader, ids: np.ndarray, steps: np.ndarray, rank: int, totals: np.ndarray
) -> pa.Table:
    per_step = len(ids) // len(steps)
    real = ids[ids != PADDING]
    stand_in = real[0] if len(real) else 0
    table = reader.take(np.where(ids == PADDING, stand_in, ids))
    for name, values in (
        ("row_id", ids),
        ("step", np.repeat(steps, per_step)),
        ("rank", np.full(len(ids), rank)),
        ("denominator", np.repeat(totals, per_step)),
    ):
        table = table.append_column(name, pa.array(values, type=pa.int64()))
    return table


Block = tuple[np.ndarray, np.ndarray, int, np.ndarray]
"""Row ids, steps, rank and denominators of one read task."""


def blocks_of_ranks(
    order: Order, n_targets: np.ndarray, segment: Segment, world_size: int
) -> list[list[Block]]:
    """Every rank's blocks of a segment, in the order of its steps."""
    size = steps_per_block(order.global_batch_size, world_size)
    out: list[list[Block]] = [[] for _ in range(world_size)]
    for start in range(segment[0], segment[1], size):
        steps = range(start, min(start + size, segment[1]))
        batches = [order.batch(step) for step in steps]
        totals = np.array([n_targets[b[b != PADDING]].sum() for b in batches], dtype=np.int64)
        for rank in range(world_size):
            ids = np.concatenate([order.rank_rows(step, rank, world_size) for step in steps])
            out[rank].append((ids, np.array(steps), rank, totals))
    return out


def make_dataset(reader: ShardReader, blocks: Sequence[Block]) -> Any:
    """A Ray Data set of one rank's blocks, lazily read, in order."""
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class PreparedBlocks(Datasource):
        """Our shards as Ray Data read tasks, one per block."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            meta = partial(BlockMetadata, size_bytes=None, exec_stats=None, input_files=None)
            return [
                ReadTask(partial(_read_block, reader, *block), meta(num_rows=len(block[0])))
                for block in blocks
            ]

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        return ray.data.read_datasource(
            PreparedBlocks(),
            override_num_blocks=len(blocks),
            num_cpus=READ_CPUS,
            concurrency=READ_TASKS,
        )


def read_here(reader: ShardReader, blocks: Iterable[Block]) -> Iterator[pa.Table]:
    """The blocks' rows, read by this process."""
    for block in blocks:
        yield from _read_block(reader, *block)


def read_by_ray(reader: ShardReader, blocks: Sequence[Block]) -> Iterator[pa.Table]:
    """The blocks' rows, read by Ray Data from now on and to the end, whatever is taken of them.

    Its executor then ends, and takes no more of this process' time; the blocks wait in the object store.
    A block that does not come for RETRY_S is read here, and so are the next ones until Ray Data has caught up:
    it waits for a process on another node where its own is drained, and for the head where that is lost.
    """
    import ray

    refs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            for bundle in make_dataset(reader, blocks).iter_internal_ref_bundles():
                for entry in bundle.blocks:
                    refs.put(entry.ref)
        except BaseException as error:  # noqa: BLE001, raised again where the blocks are taken
            refs.put(error)

    def come(timeout_s: float | None) -> pa.Table | None:
        try:
            ref = refs.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(ref, BaseException):
            raise ref
        table: pa.Table = ray.get(ref)
        return table

    threading.Thread(target=run, name="ray-data", daemon=True).start()
    return take_or_read(reader, blocks, come)


def take_or_read(
    reader: ShardReader,
    blocks: Sequence[Block],
    come: Callable[[float | None], pa.Table | None],
) -> Iterator[pa.Table]:
    """The blocks' rows; read here where `come(timeout_s)`, which gives pieces of blocks in their order, has none."""
    late = 0  # rows that were read here and are still to come
    for block in blocks:
        taken, rows = 0, len(block[0])
        while taken < rows:
            # No piece of a block is read here: it is all or nothing.
            table = come(None if taken else 0.001 if late else RETRY_S)
            if table is None:
                late += rows
                yield from _read_block(reader, *block)
                break
            if late:
                late -= table.num_rows
            else:
                taken += table.num_rows
                yield table


def _read_block(
    reader: ShardReader, ids: np.ndarray, steps: np.ndarray, rank: int, totals: np.ndarray
) -> list[pa.Table]:
    return [_with_position(reader, ids, steps, rank, totals)]


def read_steps(
    tables: Iterable[pa.Table], segment: Segment, rank: int, rows_per_step: int
) -> Iterator[StepRows]:
    """A rank's steps of one segment; raises DataError where a block is not the one due."""
    due = segment[0]
    for table in tables:
        for step_rows in unpack(table, rows_per_step):
            _verify(step_rows[1], step_rows[2], due, rank)
            due += 1
            yield step_rows[0]
    if due != segment[1]:
        raise DataError(f"the stream ended at step {due}, step {segment[1]} was due")


def _verify(step: int, rank: int, due: int, mine: int) -> None:
    if (step, rank) != (due, mine):
        raise DataError(
            f"the stream delivered step {step} of rank {rank} where step {due} of rank {mine} was due. "
            "Training on would use wrong rows; please report this with the Ray version."
        )


def unpack(table: pa.Table, rows_per_step: int) -> Iterator[tuple[StepRows, int, int]]:
    """Cut a block into steps: (rows, step, rank)."""
    ids, steps, ranks, totals = (table.column(name).to_numpy() for name in POSITION)
    rows, lengths = unpack_rows(table), table.column("length").to_numpy()
    for start in range(0, table.num_rows, rows_per_step):
        span = slice(start, start + rows_per_step)
        weights = (ids[span] != PADDING).astype(np.float32)
        step = int(steps[start])
        tokens = int(lengths[span][weights > 0].sum())
        mine = StepRows(step, rows[span], weights, ids[span], int(totals[start]), tokens)
        yield mine, step, int(ranks[start])


def unpack_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Feature arrays per row, views into the table."""
    names = [n for n in table.column_names if n not in (*POSITION, *COUNTS)]
    columns = {name: _row_arrays(table.column(name)) for name in names}
    return [{name: get(i) for name, get in columns.items()} for i in range(table.num_rows)]


def _row_arrays(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """Row → numpy view of a list column, or the value of a plain one, without copying."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    if not pa.types.is_list(array.type):
        plain = array.to_numpy(zero_copy_only=False)
        return lambda i: plain[i]
    offsets, values = array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=False)
    return lambda i: values[offsets[i] : offsets[i + 1]]


def micro_batches(step: StepRows, micro_batch_size: int) -> Sequence[tuple[list[Any], np.ndarray]]:
    """(rows, weights) per forward pass, all of `micro_batch_size` rows; the last is filled up."""
    out = []
    for start in range(0, len(step.rows), micro_batch_size):
        rows, weights = (
            step.rows[start : start + micro_batch_size],
            step.weights[start : start + micro_batch_size],
        )
        missing = micro_batch_size - len(rows)
        out.append(
            (rows + rows[:1] * missing, np.concatenate([weights, np.zeros(missing, np.float32)]))
        )
    return out
