"""A sweep on warm slots against Ray Tune starting a TorchTrainer per trial: makespan, cost of a trial, memory.

Both sides are commands, timed from start to exit, start-up and shutdown included, one after the other.
Trials: MiniLM on movie reviews, the same points, rows, rungs and ASHA settings.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from common import (
    CPUS,
    HERE,
    MINILM,
    REVIEWS,
    Options,
    median,
    options,
    report,
    require_data,
    run,
    run_folder,
    tail,
    train,
    workspace,
)

from orchestrator.report.records import read_records, read_steps
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import SweepFolder

SLOTS = 2
THREADS = max(1, CPUS // SLOTS)
FACTOR = 3
RUNGS = (2, 6, 18)
ROWS = 16
TRAIN_ROWS, EVAL_ROWS = 2000, 64


def main() -> None:
    given = options(__doc__ or "", repetitions=1)
    require_data()
    with workspace() as folder:
        write_rows(folder)
        points = grid(2 if given.quick else 12)
        ours = [our_side(folder / f"ours-{i}", folder, points) for i in range(given.repetitions)]
        stock = [
            stock_side(folder / f"stock-{i}", folder, points) for i in range(given.repetitions)
        ]
        same = same_answers(SweepFolder(folder / "ours-0" / "runs" / "sweep"), folder / "alone")
        memory = {s: slot_memory(folder, s, 4 if given.quick else 50) for s in (2, 3)}
    show({**figures_of(ours, stock, memory), "same_answers": same}, given)


def write_rows(folder: Path) -> None:
    """The first rows of the reviews: training rows, then held-out ones."""
    with open(REVIEWS, encoding="utf-8") as handle:
        rows = [
            row
            for _, row in zip(range(TRAIN_ROWS + EVAL_ROWS), csv.DictReader(handle), strict=False)
        ]
    for name, part in (("train", rows[:TRAIN_ROWS]), ("eval", rows[TRAIN_ROWS:])):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(part[0]))
            writer.writeheader()
            writer.writerows(part)


def grid(count: int) -> list[dict[str, float]]:
    """Learning rates a factor apart, two weight decays."""
    rates = [10 ** (-5 + 3 * k / max(count // 2 - 1, 1)) for k in range(count // 2)]
    return [{"lr": rate, "weight_decay": decay} for rate in rates for decay in (0.0, 0.1)]


def job(data: Path, points: list[dict[str, float]], folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "name": "sweep",
        "storage_path": str(folder / "runs"),
        "task": {"type": "text_classification", "labels": ["negative", "positive"]},
        "model": {"pretrained": str(MINILM)},
        "data": {
            "train": str(data / "train.csv"),
            "eval": str(data / "eval.csv"),
            "max_length_tokens": 128,
            "prepared_dir": str(folder / "prepared"),
        },
        "batch": {"global_batch_size": ROWS},
        "zero": {"stage": 2},
        "schedule": {"type": "constant"},
        "stop": {"max_steps": RUNGS[-1]},
        "evaluation": {"every_steps": "end"},
        "resources": {"num_workers": 1, "cpus_per_worker": THREADS, "gpus_per_worker": 0},
        "sweep": {
            "space": {
                "optimizer.lr": list(dict.fromkeys(p["lr"] for p in points)),
                "optimizer.weight_decay": [0.0, 0.1],
            },
            "searcher": {"type": "grid"},
            "scheduler": {"type": "asha", "grace_period": RUNGS[0], "reduction_factor": FACTOR},
            "max_concurrent_trials": SLOTS,
        },
        **fields,
    }


def our_side(folder: Path, data: Path, points: list[dict[str, float]]) -> dict[str, Any]:
    """`orchestrator sweep`: makespan, start-up, and what each trial cost beside its training."""
    folder.mkdir()
    started, makespan_s = orchestrator_sweep(folder, job(data, points, folder))
    sweep = SweepFolder(folder / "runs" / "sweep")
    ran = sorted(read_records(sweep.slots), key=lambda r: r["began"])
    first = {r["trial"]: first_step(sweep, r["trial"]) for r in ran}
    overheads, handovers, occupied_s, training_s = [], [], 0.0, 0.0
    stopped = {
        r["trial"]: r["time"] for r in read_records(sweep.log) if r["kind"] == "report" and not r["go_on"]
    }  # fmt: skip
    for slot in range(SLOTS):
        mine = [r for r in ran if r["slot"] == slot]
        for before, after in itertools.pairwise(mine):
            step = read_steps(sweep.trial(after["trial"]).steps)[0]
            begins = first[after["trial"]] - worked_s(step)
            overheads.append(begins - before["ended"])
            if before["trial"] in stopped:
                handovers.append(begins - stopped[before["trial"]])
            occupied_s += after["ended"] - before["ended"]
            training_s += trained_s(sweep, after["trial"])
    return {
        "makespan_s": makespan_s,
        "startup_s": min(first.values()) - started,
        "overhead_s": median(overheads) if overheads else math.nan,
        "handover_s": median(handovers) if handovers else math.nan,
        "longest_handover_s": max(handovers, default=math.nan),
        "marginal": occupied_s / training_s if training_s else math.nan,
        "steps": sum(read_steps(sweep.trial(r["trial"]).steps)[-1]["step"] for r in ran),
        "trial_s": median([trained_s(sweep, r["trial"]) for r in ran]),
    }


def orchestrator_sweep(folder: Path, spec: dict[str, Any]) -> tuple[float, float]:
    """Run it; (time of day it began, seconds it took)."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    started = time.time()
    run([sys.executable, "-m", "orchestrator", "sweep", str(path)], folder / "log")
    return started, time.time() - started


def first_step(sweep: SweepFolder, trial: str) -> float:
    """When a trial's first optimizer step was done."""
    return float(read_steps(sweep.trial(trial).steps)[0]["time"])


def worked_s(step: dict[str, Any]) -> float:
    """Seconds of a step without the wait for its rows, which is no training."""
    return float(step["step_s"] - step["wait_s"])


def trained_s(sweep: SweepFolder, trial: str) -> float:
    """Seconds of a trial's steps and evaluations alone."""
    folder = sweep.trial(trial)
    steps = sum(worked_s(r) for r in read_steps(folder.steps))
    return float(steps + sum(r["eval_s"] for r in read_steps(folder.evals)))


def same_answers(sweep: SweepFolder, folder: Path) -> dict[str, int]:
    """Each trial's job trained alone by `orchestrator train`: how many give the trial's figures to the last bit.

    But for the mean training loss since the evaluation before: alone, a job is evaluated more often.
    """
    folder.mkdir()
    log, same = open_log(sweep), 0
    for trial in log.trials.values():
        job = yaml.safe_load(sweep.trial(trial.id).spec.read_text(encoding="utf-8"))
        job["evaluation"] = {"every_steps": RUNGS[0]}
        with suppress(SystemExit):  # one that was stopped early may diverge later on
            train(folder, job)
        found = {r["step"]: r for r in read_steps(run_folder(folder, job).evals)}
        same += all(
            found.get(step, {}).get(name) == value
            for step, figures in trial.reports.items()
            for name, value in figures.items()
            if name != "train_loss"
        )
    return {"trials": len(log.trials), "same": same}


def stock_side(folder: Path, data: Path, points: list[dict[str, float]]) -> dict[str, Any]:
    """Ray Tune and a TorchTrainer per trial."""
    folder.mkdir()
    setup = {
        "points": points, "slots": SLOTS, "steps": RUNGS[-1], "rungs": RUNGS, "rows": ROWS,
        "threads": THREADS, "model": str(MINILM), "factor": FACTOR, "folder": str(folder),
        "train": str(data / "train.csv"), "eval": str(data / "eval.csv"),
    }  # fmt: skip
    (folder / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
    started = time.time()
    run([sys.executable, str(HERE / "stock_sweep.py"), str(folder / "setup.json")], folder / "log")
    makespan_s = time.time() - started
    found = json.loads((folder / "result.json").read_text())
    if found["errors"]:
        sys.exit(f"{found['errors']} trials of the stock side failed:\n{tail(folder / 'log')}")
    trained = [t for t in found["trials"] if t["training_s"]]
    return {
        "makespan_s": makespan_s,
        "steps": sum(t["step"] for t in trained),
        "training_s": sum(t["training_s"] for t in trained),
    }


def slot_memory(folder: Path, stage: int, trials: int) -> dict[str, float]:
    """RSS of one slot's worker in its fifth trial and in its last one, MiB."""
    root = folder / f"memory-{stage}"
    root.mkdir()
    spec = job(folder, grid(2), root, zero={"stage": stage}, stop={"max_steps": 2})
    spec["sweep"] = {
        "space": {"optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}},
        "num_trials": trials, "scheduler": {"type": "none"}, "max_concurrent_trials": 1,
    }  # fmt: skip
    spec["batch"] = {"global_batch_size": 4}
    orchestrator_sweep(root, spec)
    sweep = SweepFolder(root / "runs" / "sweep")
    ran = sorted(read_records(sweep.slots), key=lambda r: r["began"])
    used = [read_steps(sweep.trial(r["trial"]).steps)[-1]["memory_bytes"] / 2**20 for r in ran]
    return {"early_mib": used[min(4, len(used) - 1)], "late_mib": used[-1]}


def figures_of(
    ours: list[dict[str, Any]], stock: list[dict[str, Any]], memory: dict[int, dict[str, float]]
) -> dict[str, Any]:
    makespan = median([s["makespan_s"] for s in stock]) / median([o["makespan_s"] for o in ours])
    return {
        "speedup": round(makespan, 2),
        "marginal_over_training": round(median([o["marginal"] for o in ours]), 3),
        "startup_s": round(median([o["startup_s"] for o in ours]), 1),
        "overhead_s": median([o["overhead_s"] for o in ours]),
        "handover_s": median([o["handover_s"] for o in ours]),
        "ours": ours,
        "stock": stock,
        "memory": {str(k): v for k, v in memory.items()},
        "memory_ratio": {
            str(k): round(v["late_mib"] / v["early_mib"], 3) for k, v in memory.items()
        },
    }


def show(figures: dict[str, Any], given: Options) -> None:
    def each(side: str, key: str) -> str:
        return " ".join(f"{one[key]:.1f}" for one in figures[side])

    rows = [
        ("what", "warm slots", "a TorchTrainer per trial"),
        ("makespan, s", each("ours", "makespan_s"), each("stock", "makespan_s")),
        ("optimizer steps in all", each("ours", "steps"), each("stock", "steps")),
        ("times as fast", f"{figures['speedup']:.2f}", "1"),
        ("command → first step, s", f"{figures['startup_s']:.1f}", ""),
        ("slot free → next trial's first step begins, s", f"{figures['overhead_s']:.2f}", ""),
        ("told to stop → next trial's first step begins, s", f"{figures['handover_s']:.2f}", ""),
        (
            "trials that give the same alone, to the bit",
            f"{figures['same_answers']['same']} of {figures['same_answers']['trials']}",
            "",
        ),
        ("one more trial ÷ its own training", f"{figures['marginal_over_training']:.2f}", ""),
    ]
    for stage, used in figures["memory"].items():
        grown = f"{used['early_mib']:.0f} → {used['late_mib']:.0f}"
        rows.append((f"RSS of a slot, trial 5 → last, ZeRO {stage}, MiB", grown, ""))
    report(f"Sweep of MiniLM, {SLOTS} slots, {os.cpu_count()} cores", rows, figures, given)


if __name__ == "__main__":
    main()
