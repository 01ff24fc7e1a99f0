"""Random access to prepared shards: memory-mapped, nothing read but the rows asked for."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.data.manifest import Manifest


class ShardReader:
    """Rows of one prepared data set by global row id (shards in manifest order).

    `beside`: a set with further columns of the same rows, which may be cut into other shards.
    """

    def __init__(
        self,
        folder: str,
        shard_files: tuple[str, ...],
        shard_rows: tuple[int, ...],
        batch_rows: int,
        beside: ShardReader | None = None,
    ) -> None:
        self.folder = folder
        self.shard_files = shard_files
        self.starts = np.cumsum([0, *shard_rows])
        self.batch_rows = batch_rows
        self.beside = beside

    def take(self, rows: np.ndarray) -> pa.Table:
        """The given rows, shape (n,), in the given order; touches only the record batches they are in."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        local = rows - self.starts[shard_of]
        place = shard_of * (1 << 40) + local // self.batch_rows
        by_place = np.argsort(place, kind="stable")
        edges = np.flatnonzero(np.diff(place[by_place], prepend=-1, append=-1))
        parts = []
        for start, stop in pairwise(edges):
            chosen = by_place[start:stop]
            batch = self._batch(int(shard_of[chosen[0]]), int(local[chosen[0]] // self.batch_rows))
            parts.append(batch.take(pa.array(local[chosen] % self.batch_rows)))
        gathered = pa.Table.from_batches(parts).combine_chunks()
        back = np.empty(len(rows), dtype=np.int64)
        back[by_place] = np.arange(len(rows))
        table = gathered.take(pa.array(back))
        if self.beside is not None:
            further = self.beside.take(rows)
            for name in further.column_names:
                table = table.append_column(name, further.column(name))
        return table

    @property
    def row_bytes(self) -> int:
        """Mean size of a row in the files."""
        sizes = [(Path(self.folder) / name).stat().st_size for name in self.shard_files]
        return sum(sizes) // max(int(self.starts[-1]), 1)

    def column(self, name: str) -> np.ndarray:
        """A whole column of integers, shape (rows,), or of lists of them, one after the other."""
        parts = []
        for i in range(len(self.shard_files)):
            file = _open(self.folder, self.shard_files[i])
            for k in range(file.num_record_batches):
                values = file.get_batch(k).column(name)
                if pa.types.is_list(values.type):
                    values = values.flatten()
                parts.append(values.to_numpy(zero_copy_only=False))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _batch(self, shard: int, index: int) -> pa.RecordBatch:
        return _open(self.folder, self.shard_files[shard]).get_batch(index)


def open_shards(
    folder: Path | str, manifest: Manifest, beside: ShardReader | None = None
) -> ShardReader:
    """A reader over all shards of `manifest`."""
    files = tuple(s.file for s in manifest.shards)
    rows = tuple(s.rows for s in manifest.shards)
    return ShardReader(str(folder), files, rows, manifest.batch_rows, beside)


@lru_cache(maxsize=256)
def _open(folder: str, name: str) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(Path(folder) / name), "r"))
