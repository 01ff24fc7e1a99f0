"""Sweep folders as a sweep leaves them, made up: many trials, on slots, with times that add up."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.run_folder import SweepFolder, write_atomically, write_json

Record = dict[str, Any]
START = 1_700_000_000.0
STARTUP_S, STEP_S, EVAL_S, HANDOVER_S = 20.0, 0.5, 2.0, 0.5
SPACE: Record = {
    "optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-2, "when": {}},
    "optimizer.weight_decay": [0, 0.01, 0.1],
    "schedule.warmup_ratio": {"type": "uniform", "low": 0.0, "high": 0.3, "when": {}},
}


@dataclass
class Made:
    """Writes one sweep; `free` is when each slot is free."""

    folder: SweepFolder
    rungs: tuple[int, ...]
    scheduler: str
    slots: int
    log: list[Record] = field(default_factory=list)
    ran: list[Record] = field(default_factory=list)
    free: dict[int, float] = field(default_factory=dict)
    at_rung: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = dict.fromkeys(range(self.slots), START + STARTUP_S)

    def trial(
        self, index: int, values: Record, name: str = "", parent: tuple[str, int] | None = None,
        end: str | None = None, message: str = "", until: int | None = None,
    ) -> float:  # fmt: skip
        """Run one trial to its end; returns its last value. `until`: it fails, or is left, at that step."""
        name = name or f"t{index:05d}"
        slot = min(self.free, key=lambda s: self.free[s])
        began = now = self.free[slot]
        self.log.append(
            {"time": began - 0.1, "kind": "trial", "trial": name, "index": index, "values": values,
             "parent": list(parent) if parent else None}
        )  # fmt: skip
        run = self.folder.trial(name)
        steps, evals = [], []
        events: list[Record] = [{"time": began, "kind": "find"}]
        step, value, status = parent[1] if parent else 0, math.nan, "finished"
        while step < (until or self.rungs[-1]):
            step, now = step + 1, now + STEP_S
            steps.append(
                {"step": step, "time": now, "loss": 1 - _accuracy(values, step, index), "lr": 1e-3,
                 "tokens": 100, "step_s": STEP_S, "wait_s": STEP_S / 10}
            )  # fmt: skip
            if step in self.rungs:
                now, value = now + EVAL_S, _accuracy(values, step, index)
                evals.append({"step": step, "time": now, "accuracy": value, "eval_s": EVAL_S})
                last = step == self.rungs[-1]
                go_on = last or self._goes_on(step, value)
                metrics = {"accuracy": value, "loss": 1 - value, "eval_s": EVAL_S}
                self.log.append(
                    {"time": now, "kind": "report", "trial": name, "step": step, "key": float(step),
                     "metrics": metrics, "go_on": go_on, "save": False}
                )  # fmt: skip
                if not go_on:
                    status = "pruned"
                    break
        if end is not None or until is None:
            self.log.append(
                {"time": now + 0.1, "kind": "end", "trial": name, "status": end or status,
                 "step": step, "message": message}
            )  # fmt: skip
            self.ran.append(
                {"time": now + 0.2, "kind": "ran", "trial": name, "slot": slot, "began": began, "ended": now + 0.2}
            )  # fmt: skip
        self.free[slot] = now + 0.2 + HANDOVER_S
        write_lines(run.steps, steps)
        write_lines(run.evals, evals)
        write_lines(run.events, events)
        write_json(run.plan, {"rungs": list(self.rungs)})
        return value

    def _goes_on(self, step: int, value: float) -> bool:
        if self.scheduler == "pbt":
            return False
        others = self.at_rung.setdefault(step, [])
        others.append(value)
        return self.scheduler == "none" or value >= sorted(others, reverse=True)[len(others) // 3]

    def write(self, status: str | None = "finished", **plan: Any) -> SweepFolder:
        """All files; without a `status` the sweep is under way."""
        folder, ended = self.folder, max(self.free.values())
        spec = {
            "name": folder.name,
            "task": {"type": "text_classification"},
            "sweep": {
                "space": SPACE, "searcher": {"type": "random"}, "scheduler": {"type": self.scheduler},
            },
        }  # fmt: skip
        base = {
            "metric": "accuracy", "higher_is_better": True, "num_workers": 1, "stage": 0, "bf16": False,
            "global_batch_size": 32, "total_steps": self.rungs[-1], "reasons": {"stage": "it fits"},
        }  # fmt: skip
        count = len(self.log and [r for r in self.log if r["kind"] == "trial"])
        made = {
            "spec": spec, "base": base, "slots": self.slots, "num_trials": count, "rungs": self.rungs,
            "expected": [round(count / 3**i, 1) for i in range(len(self.rungs))],
            "expected_steps": 1000, "reasons": {"slots": "4 CPUs, 1 × 1 per trial"}, "warnings": ["a warning"],
        }  # fmt: skip
        write_json(folder.plan, made | plan)
        write_lines(folder.log, sorted(self.log, key=lambda r: r["time"]))
        write_lines(folder.slots, sorted(self.ran, key=lambda r: r["time"]))
        events = [{"time": START, "kind": "launch", "slots": self.slots}]
        write_atomically(folder.spec, f"name: {folder.name}\n")
        if status is not None:
            events.append({"time": ended, "kind": "end", "trials": count})
            write_json(folder.outcome, {"status": status, "message": ""})
            write_atomically(folder.best, f"name: {folder.name}-best\n")
        write_lines(folder.events, events)
        return folder


def make_sweep(
    root: Path, count: int, scheduler: str = "asha", slots: int = 4, seed: int = 0
) -> Made:
    """`count` trials, of which every 13th fails."""
    made, draw = Made(SweepFolder(root), (5, 15, 45), scheduler, slots), np.random.default_rng(seed)
    for index in range(count):
        if index % 13 == 7:
            message = "Traceback …\nValueError: loss is nan at step 3"
            made.trial(index, draw_values(draw), end="diverged", message=message, until=3)
        else:
            made.trial(index, draw_values(draw))
    return made


def make_population(root: Path, members: int = 8, generations: int = 4) -> Made:
    """Population-based training: after each generation the worst two go on from the best."""
    rungs = tuple(10 * (g + 1) for g in range(generations))
    made, draw = Made(SweepFolder(root), rungs, "pbt", 4), np.random.default_rng(1)
    values = [draw_values(draw) for _ in range(members)]
    last = [made.trial(m, values[m], f"m{m:03d}g00") for m in range(members)]
    for g in range(1, generations):
        ranked = sorted(range(members), key=lambda m: last[m], reverse=True)
        heirs = {m: m for m in range(members)} | dict.fromkeys(ranked[-2:], ranked[0])
        values = [
            values[m]
            if heirs[m] == m
            else draw_values(draw) | {"optimizer.lr": values[heirs[m]]["optimizer.lr"]}
            for m in range(members)
        ]
        last = [
            made.trial(
                g * members + m, values[m], f"m{m:03d}g{g:02d}", (f"m{heirs[m]:03d}g{g - 1:02d}", rungs[g - 1])
            )
            for m in range(members)
        ]  # fmt: skip
    return made


def draw_values(draw: np.random.Generator) -> Record:
    """Values of SPACE."""
    return {
        "optimizer.lr": float(np.exp(draw.uniform(math.log(1e-5), math.log(1e-2)))),
        "optimizer.weight_decay": (0, 0.01, 0.1)[int(draw.integers(3))],
        "schedule.warmup_ratio": float(draw.uniform(0, 0.3)),
    }


def _accuracy(values: Record, step: int, index: int) -> float:
    """Best at a rate of 1e-3; the rest matters little."""
    limit = 0.9 - 0.1 * (math.log10(values["optimizer.lr"]) + 3) ** 2
    noise = 0.01 * math.sin(12.9898 * index + step)
    return round(0.5 + (limit - 0.5) * (1 - math.exp(-step / 12)) + noise, 4)


def write_lines(path: Path, records: list[Record]) -> None:
    """One JSON object per line, as a run writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
