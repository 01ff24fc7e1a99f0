"""Seconds from the death of a worker to the next new step: ours against a stock Ray Train loop.

Each run trains MiniLM (ZeRO 2, two workers) in a Ray of its own, is left alone until it is half an
interval past a checkpoint, loses one worker to SIGKILL, and ends with the first step that it had
not reached before. Both sides write the same records, so the phases mean the same.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from common import (
    HERE,
    MINILM,
    REVIEWS,
    THREADS,
    Options,
    classification_job,
    end,
    median,
    options,
    report,
    require_data,
    run_folder,
    start,
    tail,
    train_command,
    workspace,
)

from orchestrator.report.records import read_records

T = TypeVar("T")
PHASES = {
    "killed": "notice and regroup",
    "imports": "imports",
    "find": "find the checkpoint",
    "stream": "open the stream",
    "model": "model",
    "engine": "engine",
    "load": "load",
    "ready": "rows and first step",
}
"""Event → the phase that begins with it and lasts to the next one, in whatever order they come."""
WAIT_S = 300
MANY_STEPS = 3_000
"""Length of the run that is interrupted: ten epochs."""


@dataclass(frozen=True)
class Side:
    """One command, and where it writes a line per step and per event."""

    command: list[str]
    steps: Path
    events: Path
    log: Path


@dataclass(frozen=True)
class Recovery:
    """What one kill cost."""

    new_step_s: float
    """Kill → the first step that had not been reached before."""
    first_step_s: float
    """Kill → the first step of any number."""
    split: dict[str, float]
    steps_lost: int


def main() -> None:
    given = options(__doc__ or "")
    require_data()
    interval = 10 if given.quick else 20
    results: dict[str, list[Recovery]] = {"ours": [], "stock": []}
    with workspace() as folder:
        for i in range(given.repetitions):
            for name, make in (("ours", our_side), ("stock", stock_side)):
                place = folder / f"{name}-{i}"
                place.mkdir()
                results[name].append(kill_one_worker(make(place, interval), interval))
    show(results, interval, given)


def our_side(folder: Path, interval: int) -> Side:
    job = classification_job("ours", MANY_STEPS)
    job |= {"zero": {"stage": 2}, "checkpoint": {"every_steps": interval}}
    run = run_folder(folder, job)
    return Side(train_command(folder, job), run.steps, run.events, folder / "log")


def stock_side(folder: Path, interval: int) -> Side:
    figures = [str(n) for n in (interval, MANY_STEPS, THREADS)]
    script, inputs = str(HERE / "stock.py"), [str(MINILM), str(REVIEWS)]
    command = [sys.executable, script, str(folder), *figures, *inputs]
    return Side(command, folder / "steps.jsonl", folder / "events.jsonl", folder / "log")


def kill_one_worker(side: Side, interval: int) -> Recovery:
    """One run: past a checkpoint, kill, back to a new step, end."""
    process = start(side.command, side.log)
    try:
        kill_at = interval + interval // 2
        wait_for(lambda: last_step(side) >= kill_at, process, side)
        victim = worker_pids(process)[-1]
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        return wait_for(lambda: recovery(side, killed), process, side)
    finally:
        end(process)


def worker_pids(process: subprocess.Popen[bytes]) -> list[int]:
    """Ray Train's workers below a process."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def wait_for(look: Callable[[], T | None], process: subprocess.Popen[bytes], side: Side) -> T:
    """Poll until `look` finds something; the benchmark ends where the run ends or hangs."""
    deadline = time.monotonic() + WAIT_S
    while True:
        if found := look():
            return found
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            sys.exit(f"{' '.join(side.command)}\nended early or took too long:\n{tail(side.log)}")
        time.sleep(0.1)


def last_step(side: Side) -> int:
    return max((r["step"] for r in read_records(side.steps)), default=0)


def recovery(side: Side, killed: float) -> Recovery | None:
    """What the kill cost; None as long as no new step has ended.

    A survivor may still end the step it was in: what was recorded before the new group's first
    event counts as reached, not as recovery.
    """
    events = [e for e in read_records(side.events) if e["time"] > killed]
    first_step = next((e for e in events if e["kind"] == "first_step"), None)
    if first_step is None:
        return None
    before = [e for e in events if e["kind"] in PHASES and e["time"] < first_step["time"]]
    begun = {e["kind"]: e["time"] for e in before}
    records = read_records(side.steps)
    reached = max(r["step"] for r in records if r["time"] < begun["imports"])
    new = [r for r in records if r["time"] > begun["imports"] and r["step"] > reached]
    if not new:
        return None
    marks = sorted({"killed": killed, **begun}.items(), key=lambda mark: mark[1])
    ends = [*(moment for _, moment in marks[1:]), first_step["time"]]
    return Recovery(
        new_step_s=new[0]["time"] - killed,
        first_step_s=first_step["time"] - killed,
        split={kind: round(end - begin, 3) for (kind, begin), end in zip(marks, ends, strict=True)},
        steps_lost=reached + 1 - first_step["step"],
    )


def show(results: dict[str, list[Recovery]], interval: int, given: Options) -> None:
    figures: dict[str, Any] = {"checkpoint_every_steps": interval}
    for name, runs in results.items():
        split = {
            k: median([r.split.get(k, 0.0) for r in runs]) for k in PHASES if k in runs[0].split
        }
        figures[f"{name}_s"] = median([r.new_step_s for r in runs])
        figures[f"{name}_first_step_s"] = median([r.first_step_s for r in runs])
        figures[f"{name}_split"] = split
        figures[f"{name}_steps_lost"] = median([r.steps_lost for r in runs])
        figures[f"{name}_runs_s"] = [round(r.new_step_s, 2) for r in runs]
    for key in ("new_step_s", "first_step_s"):
        pairs = zip(results["ours"], results["stock"], strict=True)
        ratio = statistics.median(getattr(a, key) / getattr(b, key) for a, b in pairs)
        figures["ratio" if key == "new_step_s" else "ratio_first_step"] = round(ratio, 4)
    figures["steps_lost"] = figures["ours_steps_lost"]
    rows: list[tuple[str, ...]] = [("what", "ours", "stock")]
    for kind, phase in PHASES.items():
        splits = [figures[f"{name}_split"] for name in results]
        seconds = [f"{split[kind]:.2f} s" if kind in split else "–" for split in splits]
        rows.append((f"  {phase}", *seconds))
    for words, key in (("kill → first step", "first_step_s"), ("kill → first new step", "s")):
        rows.append((words, *(f"{figures[f'{name}_{key}']:.2f} s" for name in results)))
    rows.append(("steps lost", *(f"{figures[f'{name}_steps_lost']:g}" for name in results)))
    title = f"Recovery from kill -9 of a worker: {figures['ratio']:.2f} of stock's time"
    report(title, rows, figures, given)


if __name__ == "__main__":
    main()
