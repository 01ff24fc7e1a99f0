"""Prepared rows for a model in one process, outside training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import Order
from orchestrator.data.shards import ShardReader, open_shards
from orchestrator.errors import DataError
from orchestrator.plan.data import DataStats


def rows_by_length(data: DataStats, limit: int | None, seed: int) -> tuple[ShardReader, np.ndarray]:
    """A split's reader, and row ids (rows,) from short to long: all, or `limit` drawn by `seed`.

    Raises DataError where the prepared data is gone.
    """
    manifest = read_manifest(Path(data.folder))
    if manifest is None:
        raise DataError(f"{data.folder}: prepared data is gone. Run `orchestrator prepare` again.")
    reader = open_shards(data.folder, manifest)
    ids = np.arange(data.rows)
    if limit is not None and limit < data.rows:
        ids = Order((data.rows,), limit, seed, "full").batch(0)
    return reader, ids[np.argsort(reader.column("length")[ids], kind="stable")]
