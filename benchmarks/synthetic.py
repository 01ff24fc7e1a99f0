"""Prepared data of any size, written straight in the format of data/write.py: random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.data.manifest import BATCH_ROWS, Manifest, Shard, sha256_of
from orchestrator.run_folder import write_json

ROW_TOKENS = 512
SHARD_BATCHES = 64
"""Record batches per shard."""
ROW_BYTES = ROW_TOKENS * 8 + 20
FEATURES = {"input_ids": "ints", "is_target": "ints", "doc_lengths": "ints"}
MEGABYTE = 10**6


def write_prepared(folder: Path, megabytes: int) -> None:
    """Shards and manifest of about that size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = max(1, round(megabytes * MEGABYTE / ROW_BYTES / BATCH_ROWS))
    shards = []
    for index, first in enumerate(range(0, batches, SHARD_BATCHES)):
        path = folder / f"shard-{index:05d}-00000.arrow"
        count = min(SHARD_BATCHES, batches - first)
        write_shard(path, count, rng)
        size = path.stat().st_size
        rows = count * BATCH_ROWS
        shards.append(Shard(file=path.name, rows=rows, size_bytes=size, sha256=sha256_of(path)))
    rows = sum(s.rows for s in shards)
    manifest = Manifest(
        fingerprint=folder.name, inputs=(), features=FEATURES, labels=(),
        max_length_tokens=ROW_TOKENS, longest_tokens=ROW_TOKENS, rows=rows, input_rows=rows,
        tokens=rows * ROW_TOKENS, target_tokens=rows * (ROW_TOKENS - 1), truncated_rows=0,
        bad_rows=0, shards=tuple(shards),
    )  # fmt: skip
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def write_shard(path: Path, batches: int, rng: np.random.Generator) -> None:
    offsets = pa.array(np.arange(BATCH_ROWS + 1, dtype=np.int32) * ROW_TOKENS)
    ones = pa.array(np.ones(BATCH_ROWS * ROW_TOKENS, dtype=np.int32))
    lengths = pa.array(np.full(BATCH_ROWS, ROW_TOKENS, dtype=np.int32))
    singles = pa.array(np.arange(BATCH_ROWS + 1, dtype=np.int32))
    targets = pa.array(np.full(BATCH_ROWS, ROW_TOKENS - 1, dtype=np.int32))
    names = [*FEATURES, "length", "n_targets"]
    kinds = [pa.list_(pa.int32())] * 3 + [pa.int32()] * 2
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    with pa.ipc.new_file(str(path), schema) as out:
        for _ in range(batches):
            ids = pa.array(rng.integers(5, 30_000, BATCH_ROWS * ROW_TOKENS, dtype=np.int32))
            lists = [pa.ListArray.from_arrays(offsets, values) for values in (ids, ones)]
            documents = pa.ListArray.from_arrays(singles, lengths)
            arrays = [*lists, documents, lengths, targets]
            out.write_batch(pa.record_batch(arrays, schema=schema))
