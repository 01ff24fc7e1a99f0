"""The Ray Data stream: rate against a raw memory map, time to the first batch, memory.

Synthetic prepared data (rows of 512 tokens), written in the format of data/write.py. The raw peer
reads the same rows in the same random order in one process and hands them to nobody.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import CPUS, Options, median, options, report, run, workspace
from synthetic import MEGABYTE, ROW_TOKENS, write_prepared

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import Order, rows_per_rank
from orchestrator.data.shards import ShardReader, open_shards
from orchestrator.data.stream import (
    FIRST_BLOCKS,
    blocks_of_ranks,
    read_by_ray,
    read_here,
    read_steps,
    segments,
    steps_per_block,
)
from orchestrator.launch.session import ray_session

GLOBAL_ROWS = 32
SAMPLE_S = 0.2


@dataclass(frozen=True)
class Sizes:
    """Megabytes of the data set for rates, and of those for memory; steps per timed stream."""

    rate_mb: int
    memory_mb: tuple[int, ...]
    steps: int


def main() -> None:
    given = options(__doc__ or "", repetitions=5)
    sizes = Sizes(50, (50, 100, 200), 96) if given.quick else Sizes(1000, (1000, 2000, 4000), 3000)
    require_disk(max(sizes.memory_mb))
    with workspace() as folder:
        write_prepared(folder / "rates", sizes.rate_mb)
        figures = measure_rates(folder / "rates", sizes.steps, given.repetitions)
        shutil.rmtree(folder / "rates")
        figures |= measure_memory(folder, sizes.memory_mb)
    show(figures, sizes, given)


def require_disk(megabytes: int) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 1.2 * megabytes * MEGABYTE:
        sys.exit(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free, {1.2e-3 * megabytes:.1f} needed"
        )


@dataclass(frozen=True)
class Data:
    """A prepared data set, opened as train/data_loader.py opens it."""

    reader: ShardReader
    order: Order
    n_targets: np.ndarray

    def open(self, start: int, stop: int, consumers: int) -> list[list[Any]]:
        """What each consumer is told: every segment of these steps, where to read, and its blocks."""
        told: list[list[Any]] = [[] for _ in range(consumers)]
        for segment in segments(start, stop, GLOBAL_ROWS, consumers, self.reader.row_bytes):
            ranks = blocks_of_ranks(self.order, self.n_targets, segment, consumers)
            for mine, blocks in zip(told, ranks, strict=True):
                mine.append((segment, self.reader, blocks))
        return told


def open_data(folder: Path) -> Data:
    manifest = read_manifest(folder)
    assert manifest is not None
    reader = open_shards(folder, manifest)
    order = Order(tuple(s.rows for s in manifest.shards), GLOBAL_ROWS, seed=1, shuffle="full")
    return Data(reader, order, reader.column("n_targets"))


def make_consumers(ray: Any, count: int) -> list[Any]:
    """Actors that take steps as a training worker does, and note the time of each."""

    class Consumer:
        def consume(
            self, told: list[Any], rank: int, consumers: int, most: int
        ) -> list[tuple[float, int]]:
            marks: list[tuple[float, int]] = []
            per_step = rows_per_rank(GLOBAL_ROWS, consumers)
            ahead = started(told, 0)
            for i, (segment, *_) in enumerate(told):
                tables, ahead = ahead, None
                for step in read_steps(tables, segment, rank, per_step):
                    marks.append((time.time(), step.tokens))
                    if len(marks) == most:
                        return marks
                    if ahead is None and step.step >= sum(segment) // 2:
                        ahead = started(told, i + 1)
            return marks

    def started(told: list[Any], i: int) -> Any:
        """A segment on its way, as train/data_loader.py starts it."""
        if i == len(told):
            return iter(())
        _, reader, blocks = told[i]
        return (read_by_ray if i else read_here)(reader, blocks)

    made = ray.remote(num_cpus=1)(Consumer)
    return [made.remote() for _ in range(count)]


def stream(ray: Any, data: Data, steps: tuple[int, int], consumers: int, most: int = 0) -> Any:
    """Stream steps (or the first `most` of them) into fresh consumers: (start, their marks)."""
    actors = make_consumers(ray, consumers)
    ray.get([a.__ray_ready__.remote() for a in actors])
    started = time.time()
    told = data.open(*steps, consumers)
    calls = [
        actor.consume.remote(mine, rank, consumers, most or -1)
        for rank, (actor, mine) in enumerate(zip(actors, told, strict=True))
    ]
    marks = ray.get(calls, timeout=900)
    for actor in actors:
        ray.kill(actor)
    del told, calls
    settle(ray)
    return started, marks


def settle(ray: Any) -> None:
    """Wait until a stream that was left early has given back what it held: nothing of it may run on
    while the next one is timed."""
    gc.collect()
    deadline, total = time.monotonic() + 60, ray.cluster_resources()["CPU"]
    while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)


def stream_rate(ray: Any, data: Data, steps: int, consumers: int) -> float:
    """Tokens per second over all consumers, from the first step that came through Ray Data on."""
    _, marks = stream(ray, data, (0, steps), consumers)
    skip = FIRST_BLOCKS * steps_per_block(GLOBAL_ROWS, consumers) + 1
    began = min(mine[skip - 1][0] for mine in marks)
    ended = max(mine[-1][0] for mine in marks)
    return sum(tokens for mine in marks for _, tokens in mine[skip:]) / (ended - began)


def raw_rate(data: Data, steps: int) -> float:
    """Tokens per second of ShardReader.take, step after step, in this process."""
    data.reader.take(data.order.batch(0))
    started, tokens = time.perf_counter(), 0
    for step in range(steps):
        table = data.reader.take(data.order.batch(step))
        tokens += int(table.column("length").to_numpy().sum())
    return tokens / (time.perf_counter() - started)


def first_batch_s(ray: Any, data: Data, first_step: int) -> float:
    """Seconds from opening a stream to a step in each consumer."""
    near = first_step + FIRST_BLOCKS * steps_per_block(GLOBAL_ROWS, 2)
    started, marks = stream(ray, data, (first_step, near), consumers=2, most=1)
    return max(mine[0][0] for mine in marks) - started


def measure_rates(folder: Path, steps: int, repetitions: int) -> dict[str, Any]:
    """Rates and times to the first batch, all kinds in turn and the next time in reverse.

    The first round is a warm-up: it starts the processes that Ray keeps for later.
    """
    data = open_data(folder)
    steps = min(steps, data.order.steps_per_epoch)
    late = int(0.9 * data.order.steps_per_epoch)
    runs: dict[str, list[float]] = {}
    with ray_session(CPUS) as ray:
        for i in range(repetitions + 1):
            kinds = {
                "tokens_per_s_1": partial(stream_rate, ray, data, steps, 1),
                "tokens_per_s_2": partial(stream_rate, ray, data, steps, 2),
                "raw_tokens_per_s": partial(raw_rate, data, steps),
                "first_batch_at_0_s": partial(first_batch_s, ray, data, 0),
                "first_batch_at_90_percent_s": partial(first_batch_s, ray, data, late),
            }
            for key, measure in list(kinds.items())[:: 1 if i % 2 else -1]:
                value = measure()
                if i:
                    runs.setdefault(key, []).append(value)
    figures: dict[str, Any] = {key: median(values) for key, values in runs.items()}
    for key in ("tokens_per_s_1", "tokens_per_s_2", "raw_tokens_per_s"):
        figures[key.replace("tokens", "rows")] = round(figures[key] / ROW_TOKENS, 1)
    raw = figures["raw_tokens_per_s"]
    for n in (1, 2):
        figures[f"vs_raw_{n}"] = round(figures[f"tokens_per_s_{n}"] / raw, 4)
    starts = zip(runs["first_batch_at_90_percent_s"], runs["first_batch_at_0_s"], strict=True)
    figures["first_batch_ratio"] = round(statistics.median(a / b for a, b in starts), 4)
    return {**figures, "runs": runs}


def measure_memory(folder: Path, sizes_mb: tuple[int, ...]) -> dict[str, Any]:
    """Peaks while one epoch is streamed, each size in a process and a Ray of its own."""
    peaks = []
    for size in sizes_mb:
        data, out = folder / f"memory-{size}", folder / f"memory-{size}.json"
        write_prepared(data, size)
        run(
            [sys.executable, __file__, "--stream-epoch", str(data), str(out)], folder / "memory.log"
        )
        peaks.append({"data_mb": size, **json.loads(out.read_text())})
        shutil.rmtree(data)
    first, last = peaks[0], peaks[-1]
    return {
        "memory": peaks,
        "rss_growth": round(last["rss_mb"] / first["rss_mb"], 4),
        "private_growth": round(last["private_mb"] / first["private_mb"], 4),
        "object_store_growth": round(last["object_store_mb"] / max(first["object_store_mb"], 1), 4),
    }


def stream_epoch(folder: Path, out: Path) -> None:
    """One epoch into two consumers, with the peaks of memory in `out`."""
    with ray_session(CPUS) as ray, sampled() as peaks:
        data = open_data(folder)
        stream(ray, data, (0, data.order.steps_per_epoch), consumers=2)
    processes = peaks.pop("processes")
    sizes = {f"{name}_mb": round(value / MEGABYTE, 1) for name, value in peaks.items()}
    out.write_text(json.dumps({**sizes, "processes": processes}))


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    """Peaks of memory while the block runs."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            for name, value in memory_now().items():
                peaks[name] = max(peaks.get(name, 0), value)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def memory_now() -> dict[str, int]:
    """This process, which plays rank 0, and all Ray workers, in bytes.

    `private` leaves out mapped shards and libraries, which several processes share, and the object
    store, which is counted once, apart.
    """
    me = psutil.Process()
    sums = dict.fromkeys(("rss", "private", "mapped_files", "object_store", "processes"), 0)
    for process in (me, *me.children(recursive=True)):
        try:
            command = (process.cmdline() or [""])[0]
            if command.endswith("raylet"):
                sums["object_store"] += object_store_bytes(process.pid)
            elif command.startswith("ray::") or process.pid == me.pid:
                memory = resident_bytes(process.pid)
                sums["rss"] += memory["VmRSS"]
                sums["private"] += memory["RssAnon"]
                sums["mapped_files"] += memory["RssFile"]
                sums["processes"] += 1
        except (psutil.Error, OSError, KeyError):
            continue  # it has ended in the meantime
    return sums


def resident_bytes(pid: int) -> dict[str, int]:
    """Resident memory by kind, under the kernel's names."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    pairs = [line.split() for line in lines]
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in pairs if p[0].startswith(("VmRSS", "Rss"))}


def object_store_bytes(raylet: int) -> int:
    """Memory that the object store's files really hold; they have no name, only descriptors."""
    held = 0
    for descriptor in Path(f"/proc/{raylet}/fd").iterdir():
        with suppress(OSError):
            if "plasma" in os.readlink(descriptor):
                held += os.stat(descriptor).st_blocks * 512
    return held


def show(figures: dict[str, Any], sizes: Sizes, given: Options) -> None:
    rows: list[tuple[str, ...]] = [("what", "figure", "against raw")]
    for n in (1, 2):
        rate = f"{figures[f'tokens_per_s_{n}'] / 1e6:.2f} M tokens/s"
        rows.append((f"into {n} consumer(s)", rate, f"{figures[f'vs_raw_{n}']:.2f}"))
    rows.append(
        ("raw memory map, 1 process", f"{figures['raw_tokens_per_s'] / 1e6:.2f} M tokens/s", "")
    )
    for words, key in (("step 0", "0"), ("90 % of an epoch", "90_percent")):
        rows.append((f"first batch at {words}", f"{figures[f'first_batch_at_{key}_s']:.2f} s", ""))
    rows.append(("ratio of the two (median of pairs)", f"{figures['first_batch_ratio']:.2f}", ""))
    for peak in figures["memory"]:
        shares = f"{peak['rss_mb']:,.0f} MB RSS, {peak['private_mb']:,.0f} private"
        rows.append((f"peak with {peak['data_mb']:,} MB of data", shares, ""))
        counts = f"{peak['processes']} processes, {peak['object_store_mb']:,.0f} MB object store"
        rows.append(("", counts, ""))
    words = f"{sizes.memory_mb[-1]:,} MB over {sizes.memory_mb[0]:,} MB"
    rows.append((f"RSS, {words}", f"{figures['rss_growth']:.2f}", ""))
    rows.append((f"private, {words}", f"{figures['private_growth']:.2f}", ""))
    report("Stream: Arrow shards through Ray Data", rows, figures, given)


if __name__ == "__main__":
    if "--stream-epoch" in sys.argv:
        stream_epoch(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
