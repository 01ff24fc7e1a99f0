"""The order of rows: every row once per epoch, whatever the number of workers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import order as order_module
from orchestrator.data.order import PADDING, POOL_BATCHES, Order, rows_per_rank

quick = settings(max_examples=60, deadline=None)


@st.composite
def orders(draw: st.DrawFn, max_rows: int = 400) -> Order:
    """Any order of up to `max_rows` rows; batches small enough for several length pools."""
    shards = tuple(draw(st.lists(st.integers(1, max_rows // 8), min_size=1, max_size=8)))
    grouped = draw(st.booleans())
    lengths = np.random.default_rng(draw(st.integers(0, 9))).integers(1, 50, sum(shards))
    return Order(
        shard_rows=shards,
        global_batch_size=draw(st.one_of(st.integers(1, 4), st.integers(1, max_rows + 10))),
        seed=draw(st.integers(0, 2**32 - 1)),
        shuffle=draw(st.sampled_from(["full", "windows", "none"])),
        window_rows=draw(st.integers(1, max_rows)),
        lengths=lengths if grouped else None,
    )


def epoch_rows(order: Order, epoch: int) -> np.ndarray:
    """All positions of one epoch in turn, padding included."""
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.batch(first + i) for i in range(order.steps_per_epoch)])


@quick
@given(orders(), st.integers(0, 2))
def test_every_row_stands_in_an_epoch_exactly_once(order: Order, epoch: int) -> None:
    rows = epoch_rows(order, epoch)
    assert sorted(rows[rows != PADDING]) == list(range(order.n_rows))


@quick
@given(orders())
def test_only_the_last_batch_is_short_and_its_padding_stands_at_the_end(order: Order) -> None:
    rows = epoch_rows(order, 0)
    assert len(rows) == order.steps_per_epoch * order.global_batch_size
    assert (rows[: order.n_rows] != PADDING).all()
    assert (rows[order.n_rows :] == PADDING).all()
    assert len(rows) - order.n_rows < order.global_batch_size


@quick
@given(orders(), st.integers(1, 9), st.integers(0, 10**6))
def test_the_ranks_together_hold_the_batch_for_any_world_size(
    order: Order, world_size: int, any_step: int
) -> None:
    step = any_step % (3 * order.steps_per_epoch)
    batch = order.batch(step)
    shares = [order.rank_rows(step, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {rows_per_rank(order.global_batch_size, world_size)}
    held = np.concatenate(shares)
    assert sorted(held[held != PADDING]) == sorted(batch[batch != PADDING])


@quick
@given(orders(), st.integers(2, 9))
def test_ranks_get_equally_many_rows_or_one_less(order: Order, world_size: int) -> None:
    counts = [(order.rank_rows(0, r, world_size) != PADDING).sum() for r in range(world_size)]
    assert max(counts) - min(counts) <= 1


@quick
@given(orders(), st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_a_batch_depends_on_its_step_alone(order: Order, any_steps: list[int]) -> None:
    """Steps in any sequence, from an order that was used and from fresh ones: a resume is exact."""
    for step in (s % (3 * order.steps_per_epoch) for s in any_steps):
        used = order.batch(step)
        order_module._permutation.cache_clear()
        order_module._windows.cache_clear()
        order_module._window.cache_clear()
        assert np.array_equal(used, replace(order).batch(step))


@pytest.mark.parametrize("shuffle", ["full", "windows"])
@pytest.mark.parametrize("grouped", [False, True])
def test_epochs_and_seeds_differ(shuffle: str, grouped: bool) -> None:
    lengths = np.arange(300) % 7 if grouped else None
    order = Order((100, 100, 100), 10, 1, shuffle, 100, lengths)  # type: ignore[arg-type]
    assert not np.array_equal(epoch_rows(order, 0), epoch_rows(order, 1))
    assert not np.array_equal(epoch_rows(order, 0), epoch_rows(replace(order, seed=2), 0))
    assert np.array_equal(epoch_rows(order, 1), epoch_rows(replace(order), 1))


def test_without_shuffle_rows_stand_as_in_the_files() -> None:
    order = Order((5, 6), 4, 1, "none")
    assert epoch_rows(order, 1).tolist() == [*range(11), PADDING]


@quick
@given(st.lists(st.integers(1, 40), min_size=2, max_size=10), st.integers(1, 100))
def test_windows_of_whole_shards_are_read_one_after_the_other(
    shards: list[int], window_rows: int
) -> None:
    order = Order(tuple(shards), 7, 3, "windows", window_rows)
    rows = epoch_rows(order, 0)
    shard_of = np.searchsorted(np.cumsum(shards), rows[rows != PADDING], side="right")
    windows = order_module._windows(order.shard_rows, window_rows, 3, 0)
    stop = 0
    for window in windows:
        sizes = [shards[s] for s in window]
        start, stop = stop, stop + sum(sizes)
        assert set(shard_of[start:stop]) == set(window)
        assert sum(sizes[:-1]) < window_rows, "no larger than needed"
        assert sum(sizes) >= window_rows or window == windows[-1]
    assert stop == order.n_rows


def test_a_window_is_shuffled_and_so_are_the_windows() -> None:
    order = Order((50,) * 8, 50, 3, "windows", 50)
    batches = [order.batch(step) for step in range(8)]
    shards = [int(batch[0] // 50) for batch in batches]
    assert sorted(shards) == list(range(8))
    assert shards != list(range(8))
    assert all((np.sort(b) != b).any() for b in batches)
    assert all(len(set(b // 50)) == 1 for b in batches)


def padding_share(order: Order, lengths: np.ndarray) -> float:
    """Padding among all tokens of an epoch's batches."""
    padded = real = 0
    for step in range(order.steps_per_epoch):
        batch = order.batch(step)
        own = lengths[batch[batch != PADDING]]
        padded += int(own.max()) * len(own)
        real += int(own.sum())
    return 1 - real / padded


@pytest.mark.parametrize("shuffle", ["full", "windows"])
def test_grouping_by_length_lowers_padding_and_keeps_the_order_random(shuffle: str) -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 5000)
    plain = Order((2500, 2500), 16, 1, shuffle, 2500)  # type: ignore[arg-type]
    grouped = replace(plain, lengths=lengths)
    assert padding_share(plain, lengths) > 0.5
    assert padding_share(grouped, lengths) < 0.12
    longest = [int(lengths[grouped.batch(s)].max()) for s in range(POOL_BATCHES)]
    assert longest != sorted(longest), "batches of a pool are shuffled, not served by length"


def test_the_batches_of_a_pool_do_not_overlap_in_length() -> None:
    lengths = np.random.default_rng(0).permutation(1233)  # the last pool has a short batch
    order = Order((1233,), 10, 1, "full", lengths=lengths)
    for pool in range(3):
        stop = min((pool + 1) * POOL_BATCHES, order.steps_per_epoch)
        batches = [order.batch(s) for s in range(pool * POOL_BATCHES, stop)]
        own = [lengths[b[b != PADDING]] for b in batches]
        spans = sorted((int(o.min()), int(o.max())) for o in own)
        assert all(high < low for (_, high), (low, _) in pairwise(spans))


def test_grouping_stays_inside_its_pool() -> None:
    lengths = np.arange(2000) % 13
    grouped = Order((2000,), 8, 1, "full", lengths=lengths)
    plain = Order((2000,), 8, 1, "full")
    for pool in range(5):
        steps = range(pool * POOL_BATCHES, min((pool + 1) * POOL_BATCHES, plain.steps_per_epoch))
        served = np.sort(np.concatenate([grouped.batch(s) for s in steps]))
        assert np.array_equal(served, np.sort(np.concatenate([plain.batch(s) for s in steps])))
