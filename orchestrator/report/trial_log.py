"""The truth of a sweep: an append-only log of trials, reports, verdicts and ends, on disk before it counts."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.report.records import read_records

Ended = Literal["finished", "pruned", "diverged", "failed", "storage_failed"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a trial after a report. `save`: its state is worth a checkpoint now."""

    go_on: bool
    save: bool


@dataclass
class TrialState:
    """What the log says of one trial. `parent`: (trial, step) whose checkpoint it began with."""

    id: str
    index: int
    values: dict[str, Any]
    parent: tuple[str, int] | None = None
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    keys: dict[int, float] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    status: Ended | None = None
    message: str = ""
    best: float | None = None

    @property
    def step(self) -> int:
        """The last step it reported."""
        return max(self.reports, default=0)


class SweepLog:
    """Reads the log into `trials`, and appends to both. One process writes."""

    def __init__(self, path: Path, metric: str, maximize: bool) -> None:
        self.path, self.metric, self.maximize = path, metric, maximize
        self.trials: dict[str, TrialState] = {}
        self.order: list[tuple[str, str, int]] = []
        """(kind, trial, step) of every record, in the order of events."""
        self._best: TrialState | None = None
        for record in read_records(path):
            self._fold(record)
        if path.exists() and not _ends_well(path):  # a killed writer's last line
            with open(path, "a", encoding="utf-8") as handle:
                handle.write("\n")

    def trial(
        self, trial: str, index: int, values: dict[str, Any], parent: tuple[str, int] | None
    ) -> None:
        """A trial was proposed."""
        self._append(kind="trial", trial=trial, index=index, values=values, parent=parent)

    def report(
        self, trial: str, step: int, key: float, metrics: dict[str, float], verdict: Verdict
    ) -> None:
        """A trial reached a rung (`key`: how far, in the scheduler's unit) and was told what to do."""
        self._append(
            kind="report", trial=trial, step=step, key=key, metrics=metrics,
            go_on=verdict.go_on, save=verdict.save,
        )  # fmt: skip

    def end(self, trial: str, status: str, step: int, message: str = "") -> None:
        """A trial is over for good."""
        self._append(kind="end", trial=trial, status=status, step=step, message=message)

    def value(self, trial: TrialState, step: int) -> float:
        """The sweep's metric in a report."""
        return float(trial.reports[step][self.metric])

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value of the metric beats another one; what is not finite never does."""
        if not math.isfinite(value):
            return False
        return than is None or (value > than if self.maximize else value < than)

    def best(self) -> TrialState | None:
        """The trial with the best report so far."""
        return self._best

    def ranked(self) -> list[TrialState]:
        """Trials that reported anything, best first."""
        known = [t for t in self.trials.values() if t.best is not None]
        return sorted(known, key=lambda t: t.best or 0.0, reverse=self.maximize)

    def steps_total(self) -> int:
        """Optimizer steps of all trials, by their last reports."""
        parents = {t.id: t.parent[1] if t.parent else 0 for t in self.trials.values()}
        return sum(max(t.step - parents[t.id], 0) for t in self.trials.values())

    def _append(self, **record: Any) -> None:
        record = {"time": time.time(), **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._fold(record)

    def _fold(self, record: dict[str, Any]) -> None:
        kind, trial = record["kind"], record["trial"]
        self.order.append((kind, trial, record.get("step", 0)))
        if kind == "trial":
            parent = tuple(record["parent"]) if record["parent"] else None
            self.trials[trial] = TrialState(trial, record["index"], record["values"], parent)
            return
        state = self.trials[trial]
        match kind:
            case "report":
                state.reports[record["step"]] = record["metrics"]
                state.keys[record["step"]] = record["key"]
                state.verdicts[record["step"]] = Verdict(record["go_on"], record["save"])
                value = self.value(state, record["step"])
                if self.is_better(value, state.best):
                    state.best = value
                if self.is_better(value, self._best.best if self._best else None):
                    self._best = state
            case "end":
                state.status, state.message = record["status"], record["message"]


def _ends_well(path: Path) -> bool:
    with open(path, "rb") as handle:
        if handle.seek(0, os.SEEK_END) == 0:
            return True
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
