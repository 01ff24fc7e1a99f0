"""The truth of a sweep: an append-only log of trials, reports, decisions and ends, on disk before it counts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.metric import Metric
from orchestrator.renames import with_new_fields
from orchestrator.report.records import read_records
from orchestrator.run_folder import SweepFolder, read_json

Ended = Literal["finished", "pruned", "diverged", "failed"]


@dataclass(frozen=True)
class Decision:
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
    decisions: dict[int, Decision] = field(default_factory=dict)
    status: Ended | None = None
    message: str = ""
    best: float | None = None

    @property
    def step(self) -> int:
        """The last step it reported."""
        return max(list(self.reports), default=0)  # another thread may add one


class SweepLog:
    """Reads the log into `trials`, and appends to both. One process writes; reading changes nothing.

    A record that makes no sense (a damaged disk, an edited file) is passed over and counted.
    """

    def __init__(self, path: Path, metric: Metric) -> None:
        self.path, self.metric = path, metric
        self.trials: dict[str, TrialState] = {}
        self.order: list[tuple[str, str, int]] = []
        """(kind, trial, step) of every record, in the order of events."""
        self.unreadable = 0
        """Records that were passed over."""
        self.steps_total = 0
        """Optimizer steps of all trials together, by their last reports."""
        self.ended_since_best = 0
        """Trials that have ended since the best report so far."""
        self._best: TrialState | None = None
        for record in read_records(path):
            try:
                self._fold(record)
            except (AttributeError, KeyError, TypeError, ValueError):
                self.unreadable += 1

    def trial(
        self, trial: str, index: int, values: dict[str, Any], parent: tuple[str, int] | None
    ) -> None:
        """A trial was proposed."""
        self._append(kind="trial", trial=trial, index=index, values=values, parent=parent)

    def report(
        self, trial: str, step: int, key: float, metrics: dict[str, float], decision: Decision
    ) -> None:
        """A trial reached a rung (`key`: how far, in the scheduler's unit) and was told what to do."""
        self._append(
            kind="report", trial=trial, step=step, key=key, metrics=metrics,
            go_on=decision.go_on, save=decision.save,
        )  # fmt: skip

    def end(self, trial: str, status: str, step: int, message: str = "") -> None:
        """A trial is over for good."""
        self._append(kind="end", trial=trial, status=status, step=step, message=message)

    def value(self, trial: TrialState, step: int) -> float:
        """The sweep's metric in a report; NaN where it says none."""
        value = trial.reports[step].get(self.metric.name)
        return float(value) if isinstance(value, int | float) else math.nan

    def best(self) -> TrialState | None:
        """The trial with the best report so far."""
        return self._best

    def ranked(self, among: Iterable[TrialState] | None = None) -> list[TrialState]:
        """Trials that reported anything, of all or of some, best first."""
        some = list(self.trials.values()) if among is None else among
        known = [t for t in some if t.best is not None]
        score = self.metric.score
        return sorted(known, key=lambda t: (-score(t.best or 0.0), t is not self._best, t.index))

    def is_among_best(self, value: float, trial: TrialState, count: int) -> bool:
        """Whether `value` would put the trial among the `count` best so far."""
        if count == 1 or not math.isfinite(value):
            return self.metric.is_better(value, self._best.best if self._best else None)
        others = (t.best for t in self.trials.values() if t.id != trial.id and t.best is not None)
        return sum(not self.metric.is_better(value, other) for other in others) < count

    def _append(self, **record: Any) -> None:
        record = {"time": time.time(), **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = "" if _ends_well(self.path) else "\n"  # a killed writer's last line
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(torn + json.dumps(record) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._fold(record)

    def _fold(self, record: dict[str, Any]) -> None:
        kind, trial = record["kind"], record["trial"]
        step = 0 if kind == "trial" else int(record["step"])
        if not isinstance(trial, str):
            raise TypeError(trial)
        if kind == "trial":
            parent = (str(p[0]), int(p[1])) if (p := record["parent"]) else None
            values = with_new_fields(record["values"])
            if trial in self.trials:
                raise ValueError(f"{trial} was proposed before")
            self.trials[trial] = TrialState(trial, int(record["index"]), values, parent)
        elif kind == "report":
            decision = Decision(record["go_on"], record["save"])
            metrics = dict(record["metrics"])
            self._reported(self.trials[trial], step, float(record["key"]), metrics, decision)
        elif kind == "end":
            state = self.trials[trial]
            state.status, state.message = record["status"], str(record["message"])
            self.ended_since_best += state is not self._best
        self.order.append((kind, trial, step))

    def _reported(
        self, trial: TrialState, step: int, key: float, metrics: dict[str, Any], decision: Decision
    ) -> None:
        before = max(trial.step, trial.parent[1] if trial.parent else 0)
        self.steps_total += max(step - before, 0)
        trial.reports[step], trial.keys[step], trial.decisions[step] = metrics, key, decision
        value, best = self.value(trial, step), self._best.best if self._best else None
        if self.metric.is_better(value, trial.best):
            trial.best = value
        if self.metric.is_better(value, best):
            self._best, self.ended_since_best = trial, 0


def open_log(folder: SweepFolder) -> SweepLog:
    """The log of a sweep, by the metric that its plan names; by the loss where the plan is torn."""
    try:
        base = read_json(folder.plan)["base"]
        return SweepLog(folder.log, Metric(base["metric"], base["higher_is_better"]))
    except (KeyError, TypeError, ValueError):
        return SweepLog(folder.log, Metric.named("loss"))


def _ends_well(path: Path) -> bool:
    if not path.exists():
        return True
    with open(path, "rb") as handle:
        if handle.seek(0, os.SEEK_END) == 0:
            return True
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
