"""ASHA against random search: which share of random search's compute ASHA takes to reach what it found.

Both sides are `orchestrator sweep` on the job of jobs/sweep_lr.yaml, its reviews cut shorter and with half of
MiniLM's layers: learning rate, weight decay and warm-up, the same draws on two slots, one after the other. Random
search trains every trial to its end; ASHA runs until it has trained half as many optimizer steps in all. Compared
is the loss on held-out rows, at every rung.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import (
    CPUS,
    MINILM,
    REVIEWS,
    ROOT,
    Options,
    median,
    options,
    report,
    require_data,
    run,
    workspace,
)

from orchestrator.report.records import read_records
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import SweepFolder

SLOTS = 2
FACTOR = 4
TRIALS = 20
"""Of random search."""
ASHA_SHARE = 0.5
"""Of random search's steps, after which ASHA is ended: enough to see whether a third will do."""
STEPS, FIRST_RUNG = 256, 16
LAYERS = [0, 2, 4]
ROWS, LENGTH_TOKENS = 16, 32
EVAL_ROWS = 192


@dataclass(frozen=True)
class Size:
    """How much is run."""

    trials: int
    steps: int
    first_rung: int
    eval_rows: int

    @property
    def compute(self) -> int:
        """Optimizer steps of random search."""
        return self.trials * self.steps


@dataclass(frozen=True)
class Point:
    """The best loss so far after so many optimizer steps of all trials, and so many seconds."""

    steps: int
    seconds: float
    best: float


def main() -> None:
    given = options(__doc__ or "", repetitions=1)
    require_data()
    size = Size(2, 6, 2, 32) if given.quick else Size(TRIALS, STEPS, FIRST_RUNG, EVAL_ROWS)
    pairs = []
    with workspace() as folder:
        write_eval_rows(folder / "eval.csv", size.eval_rows)
        for seed in range(given.repetitions):
            schedulers = ({"type": "none"}, asha(size))
            pairs.append([search(folder, size, scheduler, seed) for scheduler in schedulers])
    show([compared(*pair, size) for pair in pairs], size, given)


def asha(size: Size) -> dict[str, Any]:
    return {"type": "asha", "grace_period": size.first_rung, "reduction_factor": FACTOR}


def write_eval_rows(path: Path, count: int) -> None:
    """The first held-out reviews: an evaluation must not cost more than the steps between two rungs."""
    with open(REVIEWS.with_name("eval.csv"), encoding="utf-8") as handle:
        rows = [row for _, row in zip(range(count), csv.DictReader(handle), strict=False)]
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def search(folder: Path, size: Size, scheduler: dict[str, Any], seed: int) -> list[Point]:
    """Run one sweep to the end of its compute; the best loss as it got better."""
    name = f"{scheduler['type']}-{seed}"
    job = yaml.safe_load((ROOT / "jobs" / "sweep_lr.yaml").read_text(encoding="utf-8"))
    pruning = scheduler["type"] != "none"
    compute = int(size.compute * ASHA_SHARE) if pruning else size.compute
    longest = 3 * size.first_rung // 4  # before its warm-up ends a trial says nothing of its rate
    warmup = {"type": "int_uniform", "low": 0, "high": longest}
    space = {**job["sweep"]["space"], "schedule.warmup_steps": warmup}
    del space["schedule.warmup_ratio"]
    job |= {
        "name": name,
        "storage_path": str(folder / "runs"),
        "model": {"pretrained": str(MINILM), "keep_layers": LAYERS},
        "data": {
            **job["data"], "train": str(REVIEWS), "eval": str(folder / "eval.csv"),
            "prepared_dir": str(folder / "prepared"), "max_length_tokens": LENGTH_TOKENS,
        },
        "batch": {"global_batch_size": ROWS},
        "stop": {"max_steps": size.steps},
        "evaluation": {"every_steps": "end", "metric": "loss"},
        "resources": {
            "num_workers": 1, "cpus_per_worker": max(1, CPUS // SLOTS), "gpus_per_worker": 0,
        },
        "sweep": {
            "space": space,
            "searcher": {"type": "random"},
            "scheduler": scheduler,
            "max_concurrent_trials": SLOTS,
            "seed": seed,
            "num_trials": compute // (size.first_rung if pruning else size.steps),
            "budget": {"max_steps_total": compute},
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    run([sys.executable, "-m", "orchestrator", "sweep", str(path)], folder / f"{name}.log")
    return list(curve(SweepFolder(folder / "runs" / name)))


def curve(sweep: SweepFolder) -> Iterator[Point]:
    """A point per report, in the order that they came; the last one says what was spent in all."""
    log, done, spent, best = open_log(sweep), {}, 0, math.inf
    began = next(r["time"] for r in read_records(sweep.events) if r["kind"] == "launch")
    for record in read_records(sweep.log):
        if record["kind"] != "report":
            continue
        trial, step = record["trial"], record["step"]
        spent += step - done.get(trial, 0)
        done[trial] = step
        value = log.value(log.trials[trial], step)
        best = min(best, value) if math.isfinite(value) else best
        yield Point(spent, record["time"] - began, best)


def compared(random: list[Point], pruned: list[Point], size: Size) -> dict[str, Any]:
    """ASHA's way to random search's best, as a share of random search's whole compute and time."""
    target = random[-1].best
    there = next((point for point in pruned if point.best <= target), None)
    return {
        "random_best": target,
        "asha_best": pruned[-1].best,
        "compute_to_random_best": there and round(there.steps / random[-1].steps, 3),
        "seconds_to_random_best": there and round(there.seconds / random[-1].seconds, 3),
        "steps": {"random": random[-1].steps, "asha": pruned[-1].steps},
        "curves": {
            side: [(p.steps, round(p.seconds, 1), p.best) for p in points]
            for side, points in (("random", random), ("asha", pruned))
        },
    }


def show(found: list[dict[str, Any]], size: Size, given: Options) -> None:
    def each(key: str) -> str:
        return " ".join("not reached" if one[key] is None else f"{one[key]:.4g}" for one in found)

    ratios = [one["compute_to_random_best"] for one in found]
    figures = {
        "compute_to_random_best": None if None in ratios else median(ratios),
        "runs": found,
    }
    rows = [
        ("what", "random search", "ASHA"),
        ("steps in all", *(" ".join(str(o["steps"][side]) for o in found) for side in ("random", "asha"))),
        ("best loss", each("random_best"), each("asha_best")),
        ("compute to random's best ÷ random's compute", "1", each("compute_to_random_best")),
        ("seconds to random's best ÷ random's seconds", "1", each("seconds_to_random_best")),
    ]  # fmt: skip
    title = (
        f"ASHA and random search, {size.trials} × {size.steps} steps of {ROWS} rows, {SLOTS} slots"
    )
    report(title, rows, figures, given)


if __name__ == "__main__":
    main()
