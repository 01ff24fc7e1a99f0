"""Order of rows: a pure function of data, seed, epoch and global batch.

Worker count plays no part: rank r of w takes every w-th row of each global batch. A resume at step
s is therefore a subtraction, and a change of worker count changes no batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

POOL_BATCHES = 50
"""Rows are grouped by length inside pools of this many global batches, as `transformers` does."""
PADDING = -1
"""Stands for no row: fills the last batch of an epoch, and ranks where the batch does not divide."""


@dataclass(frozen=True)
class Order:
    """The order of one data set.

    `shard_rows`: rows of each shard. `lengths`: tokens per row, shape (rows,), or None to not group.
    """

    shard_rows: tuple[int, ...]
    global_batch_size: int
    seed: int
    shuffle: Literal["full", "windows", "none"]
    window_rows: int = 1_000_000
    lengths: np.ndarray | None = field(default=None, compare=False, repr=False)
    _pools: dict[tuple[int, int], np.ndarray] = field(
        default_factory=dict, compare=False, repr=False, init=False
    )

    @property
    def n_rows(self) -> int:
        return sum(self.shard_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch; the last one may be partly padding."""
        return -(-self.n_rows // self.global_batch_size)

    def batch(self, step: int) -> np.ndarray:
        """Row ids of global batch `step` (counted from 0 over all epochs), shape (global_batch_size,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        pool, offset = divmod(index, POOL_BATCHES)
        rows = self._pool(epoch, pool)
        start = offset * self.global_batch_size
        chosen = rows[start : start + self.global_batch_size]
        missing = self.global_batch_size - len(chosen)
        return np.concatenate([chosen, np.full(missing, PADDING, dtype=np.int64)])

    def rank_rows(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """The rows of `batch(step)` that `rank` trains on, shape (rows_per_rank,), padded at the end."""
        mine = self.batch(step)[rank::world_size]
        missing = rows_per_rank(self.global_batch_size, world_size) - len(mine)
        return np.concatenate([mine, np.full(missing, PADDING, dtype=np.int64)])

    def _pool(self, epoch: int, pool: int) -> np.ndarray:
        """The rows of POOL_BATCHES consecutive batches, in the order they are seen."""
        if self.lengths is None:
            return self._shuffled(epoch, *self._pool_span(pool))
        key = (epoch, pool)  # grouping sorts thousands of rows, and 50 steps use it
        if key not in self._pools:
            if len(self._pools) >= 2:
                self._pools.clear()
            self._pools[key] = self._grouped(epoch, pool, self.lengths)
        return self._pools[key]

    def _pool_span(self, pool: int) -> tuple[int, int]:
        start = pool * POOL_BATCHES * self.global_batch_size
        return start, min(start + POOL_BATCHES * self.global_batch_size, self.n_rows)

    def _grouped(self, epoch: int, pool: int, lengths: np.ndarray) -> np.ndarray:
        """Batches of similar length in shuffled order; a short last batch stays last."""
        rows = self._shuffled(epoch, *self._pool_span(pool))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        whole = len(rows) // self.global_batch_size
        if self.shuffle == "none":
            return rows
        batches = rows[: whole * self.global_batch_size].reshape(whole, self.global_batch_size)
        batches = batches[_generator(self.seed, epoch, 2, pool).permutation(whole)]
        return np.concatenate([batches.ravel(), rows[whole * self.global_batch_size :]])

    def _shuffled(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows at positions start..stop of the epoch, before any grouping."""
        match self.shuffle:
            case "none":
                return np.arange(start, stop, dtype=np.int64)
            case "full":
                return _permutation(self.seed, epoch, self.n_rows)[start:stop]
            case "windows":
                windows = _windows(self.shard_rows, self.window_rows, self.seed, epoch)
                edges = np.cumsum([0, *(sum(self.shard_rows[s] for s in w) for w in windows)])
                first = int(np.searchsorted(edges, start, side="right")) - 1
                parts = []
                for k in range(first, len(windows)):
                    if edges[k] >= stop:
                        break
                    rows = _window(self.shard_rows, windows[k], self.seed, epoch, k)
                    parts.append(rows[max(start - edges[k], 0) : stop - edges[k]])
                return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def rows_per_rank(global_batch_size: int, world_size: int) -> int:
    """Rows each rank holds per step; ranks that get fewer hold padding."""
    return -(-global_batch_size // world_size)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return _generator(seed, epoch, 0).permutation(n_rows)


@lru_cache(maxsize=4)
def _windows(
    shard_rows: tuple[int, ...], window_rows: int, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """Shuffled shards, joined into windows of at least `window_rows` rows."""
    windows: list[tuple[int, ...]] = []
    held: list[int] = []
    for shard in _generator(seed, epoch, 1).permutation(len(shard_rows)):
        held.append(int(shard))
        if sum(shard_rows[s] for s in held) >= window_rows:
            windows.append(tuple(held))
            held = []
    return (*windows, tuple(held)) if held else tuple(windows)


@lru_cache(maxsize=4)
def _window(
    shard_rows: tuple[int, ...], shards: tuple[int, ...], seed: int, epoch: int, index: int
) -> np.ndarray:
    starts = np.cumsum([0, *shard_rows])
    rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    return rows[_generator(seed, epoch, 3, index).permutation(len(rows))]
