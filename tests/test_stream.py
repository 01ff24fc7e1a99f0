"""Ray Data hands each worker exactly its rows, in order, from any step on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny

from orchestrator.data.order import PADDING, Order, rows_per_rank
from orchestrator.data.prepare import prepare
from orchestrator.data.shards import ShardReader, open_shards
from orchestrator.data.stream import (
    FIRST_BLOCKS,
    SEGMENT_BLOCKS,
    SEGMENT_BYTES,
    Segment,
    blocks_of_ranks,
    micro_batches,
    read_by_ray,
    read_here,
    read_steps,
    segments,
    steps_per_block,
    take_or_read,
)
from orchestrator.errors import DataError

GLOBAL_ROWS = 20


@pytest.fixture(scope="module")
def source(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShardReader, Order]:
    folder = tmp_path_factory.mktemp("stream")
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(333))
    spec = tiny.job(models.bert, train, folder, data={"shard_rows": 100})
    done = prepare(spec)["train"]
    reader = open_shards(done.folder, done.manifest)
    rows = tuple(s.rows for s in done.manifest.shards)
    assert len(rows) == 4
    return reader, Order(rows, GLOBAL_ROWS, 7, "full", lengths=reader.column("length"))


def consume(
    ray: Any, source: tuple[ShardReader, Order], segment: Segment, workers: int, read: Any
) -> Any:
    """What each rank reads: (step, row ids, denominator, lengths of its rows) per step."""
    reader, order = source

    @ray.remote(num_cpus=0.1)
    def take(blocks: list[Any], rank: int) -> list[Any]:
        per_step = rows_per_rank(GLOBAL_ROWS, workers)
        steps = read_steps(read(reader, blocks), segment, rank, per_step)
        return [
            (s.step, s.row_ids.tolist(), s.denominator, [len(r["input_ids"]) for r in s.rows])
            for s in steps
        ]

    blocks = blocks_of_ranks(order, reader.column("n_targets"), segment, workers)
    return ray.get([take.remote(mine, rank) for rank, mine in enumerate(blocks)])


@pytest.mark.parametrize("read", [read_by_ray, read_here])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 29])
def test_every_rank_gets_its_rows_in_order_from_any_step(
    ray: Any, source: tuple[ShardReader, Order], workers: int, start: int, read: Any
) -> None:
    reader, order = source
    segment = (start, 3 * order.steps_per_epoch)
    lengths = reader.column("length")
    for rank, got in enumerate(consume(ray, source, segment, workers, read)):
        assert [step for step, *_ in got] == list(range(*segment))
        for step, ids, denominator, sizes in got:
            want = order.rank_rows(step, rank, workers)
            assert ids == want.tolist()
            assert denominator == (order.batch(step) != PADDING).sum()
            real = want[want != PADDING]
            assert sizes[: len(real)] == lengths[real].tolist()


@pytest.mark.parametrize("missing", [set(), {0}, {3, 4, 5}, set(range(1, 99)), {2, 9}])
def test_blocks_that_do_not_come_in_time_are_read_here_and_each_row_is_taken_once(
    ray: Any, source: tuple[ShardReader, Order], missing: set[int]
) -> None:
    """Ray Data's part is played by pieces of blocks, two of each; at the `missing` askings it has none yet."""
    reader, order = source
    segment = (0, 20 * steps_per_block(GLOBAL_ROWS, 2))
    mine, _ = blocks_of_ranks(order, reader.column("n_targets"), segment, 2)
    cut = GLOBAL_ROWS // 2  # after the first step
    pieces = [p for t in read_here(reader, mine) for p in (t.slice(0, cut), t.slice(cut))]
    asked, patience = 0, []

    def come(timeout_s: float | None) -> pa.Table | None:
        nonlocal asked
        asked += 1
        patience.append(timeout_s)
        late = timeout_s is not None and asked - 1 in missing
        return None if late or not pieces else pieces.pop(0)

    got = list(take_or_read(reader, mine, come))
    assert sum(t.num_rows for t in got) == sum(len(block[0]) for block in mine)
    want = read_steps(read_here(reader, mine), segment, 0, GLOBAL_ROWS // 2)
    steps = read_steps(iter(got), segment, 0, GLOBAL_ROWS // 2)
    for one, step in zip(steps, want, strict=True):
        assert one.step == step.step
        assert one.row_ids.tolist() == step.row_ids.tolist()
    assert None in patience, "the second half of a block is waited for"


def test_a_block_of_another_rank_is_an_error_not_a_wrong_batch(
    ray: Any, source: tuple[ShardReader, Order]
) -> None:
    reader, order = source
    (blocks,) = blocks_of_ranks(order, reader.column("n_targets"), (0, 10), 1)
    with pytest.raises(DataError, match="step 0 of rank 0 where step 0 of rank 1 was due"):
        list(read_steps(read_by_ray(reader, blocks), (0, 10), 1, GLOBAL_ROWS))


def test_segments_cover_all_steps_once_and_the_first_is_short() -> None:
    per_block = steps_per_block(32, 2)
    stop = per_block * (FIRST_BLOCKS + 2 * SEGMENT_BLOCKS)
    cut = segments(5, stop, 32, 2)
    assert cut[0] == (5, 5 + per_block * FIRST_BLOCKS)
    assert {b - a for a, b in cut[1:-1]} == {per_block * SEGMENT_BLOCKS // 2}
    assert [a for a, _ in cut[1:]] == [b for _, b in cut[:-1]]
    assert (cut[0][0], cut[-1][1]) == (5, stop)
    assert segments(stop, stop, 32, 2) == []


def test_a_segment_of_large_rows_is_no_larger_than_the_memory_it_may_fill() -> None:
    row_bytes = 2**18
    cut = segments(0, 10_000, 32, 2, row_bytes)
    rows_of_a_rank = [(b - a) * rows_per_rank(32, 2) for a, b in cut]
    assert max(rows_of_a_rank[1:]) * row_bytes <= SEGMENT_BYTES
    assert (cut[0][0], cut[-1][1]) == (0, 10_000)


def test_random_reads_return_the_rows_that_were_asked_for(
    source: tuple[ShardReader, Order],
) -> None:
    reader, order = source
    everything = reader.take(np.arange(order.n_rows))
    wanted = np.array([332, 0, 99, 100, 0, 250])
    assert reader.take(wanted).equals(everything.take(pa.array(wanted)).combine_chunks())


def test_micro_batches_are_filled_with_rows_of_weight_zero(
    ray: Any, source: tuple[ShardReader, Order]
) -> None:
    reader, order = source
    (blocks,) = blocks_of_ranks(order, reader.column("n_targets"), (0, 1), 1)
    (step,) = read_steps(read_here(reader, blocks), (0, 1), 0, GLOBAL_ROWS)
    batches = micro_batches(step, 8)
    assert [len(rows) for rows, _ in batches] == [8, 8, 8]
    assert [int(weights.sum()) for _, weights in batches] == [8, 8, 4]
