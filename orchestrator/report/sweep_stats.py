"""Read the folder of a sweep once, for its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.report.drawing import thinned
from orchestrator.report.records import finite, read_records
from orchestrator.report.run import Facts, facts_in
from orchestrator.report.trial_log import SweepLog, TrialState, open_log
from orchestrator.run_folder import RunFolder, SweepFolder

MOST_CURVE_POINTS = 60
"""Points kept of each trial's training loss: there may be thousands of trials."""
FAILURES = ("diverged", "failed")


@dataclass(frozen=True)
class TrialRun:
    """One trial: what the log says of it, and what its own run folder adds."""

    state: TrialState
    rungs: tuple[int, ...]
    """Steps at which it is compared, the last one its end."""
    evals: tuple[tuple[int, float], ...]
    """(step, the sweep's metric) of every evaluation, ascending."""
    losses: tuple[tuple[float, float | None], ...]
    """(step, training loss), thinned."""
    last_step: int
    attempts: tuple[tuple[float, float], ...]
    """(workers began with it, their last record of it), in seconds since the epoch."""
    train_s: float
    """Seconds in steps, those done again included; without `wait_s`."""
    wait_s: float
    eval_s: float
    tokens: float

    @property
    def id(self) -> str:
        return self.state.id

    @property
    def failed(self) -> bool:
        """Ended by a failure."""
        return self.state.status in FAILURES

    @property
    def first_step(self) -> int:
        """The step of the checkpoint it began with."""
        return self.state.parent[1] if self.state.parent else 0

    @property
    def steps(self) -> int:
        """Steps that it trained itself."""
        return max(self.last_step - self.first_step, 0)


@dataclass(frozen=True)
class Sweep:
    """What a sweep left behind. Missing files are empty values; `notes` names unreadable ones."""

    name: str
    plan: Facts
    outcome: Facts
    log: SweepLog
    records: list[Facts]
    """The log's records, with their times."""
    trials: list[TrialRun]
    """As they were proposed."""
    slots: list[Facts]
    events: list[Facts]
    best_job: str
    job_text: str
    notes: list[str]

    @property
    def spec(self) -> Facts:
        """The sweep section of the job."""
        return dict((self.plan.get("spec") or {}).get("sweep") or {})

    @property
    def scheduler(self) -> str:
        """Its type."""
        return str((self.spec.get("scheduler") or {}).get("type", ""))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps of the base job at which trials are compared."""
        return tuple(self.plan.get("rungs") or ())

    @property
    def planned_trials(self) -> int | None:
        """Trials there will be; in population-based training each generation of a member is one."""
        count = finite(self.plan.get("num_trials"))
        if count is None:
            return None
        return int(count) * (len(self.rungs) if self.scheduler == "pbt" else 1)

    @property
    def best(self) -> TrialRun | None:
        """The trial with the best report."""
        best = self.log.best()
        return next((t for t in self.trials if best is not None and t.id == best.id), None)

    @property
    def under_way(self) -> bool:
        """Whether the last launch has left no word of its end."""
        kinds = [e["kind"] for e in self.events if e["kind"] in ("launch", "end")]
        return kinds[-1:] == ["launch"]

    def ranked(self) -> list[TrialRun]:
        """Best first, then those that reported nothing."""
        by_id = {t.id: t for t in self.trials}
        known = [by_id[state.id] for state in self.log.ranked()]
        return known + [t for t in self.trials if t.state.best is None]

    def dimensions(self) -> dict[str, Facts]:
        """Searched field → `type`, and `low` and `high` or `values`; plain lists read as choices."""
        space = dict(self.spec.get("space") or {})
        for trial in self.trials:  # a plan that cannot be read: the values say what was searched
            space |= {path: None for path in trial.state.values if path not in space}
        return {path: self._dimension(path, given) for path, given in space.items()}

    def _dimension(self, path: str, given: Any) -> Facts:
        facts = {"type": "choice", "values": given} if isinstance(given, list) else given
        if isinstance(facts, dict) and "type" in facts:
            bounds = [finite(facts.get("low")), finite(facts.get("high"))]
            if isinstance(facts.get("values"), list) or None not in bounds:
                return facts
        known = [v for t in self.trials if (v := finite(t.state.values.get(path))) is not None]
        return {"type": "uniform", "low": min(known, default=0.0), "high": max(known, default=0.0)}


def read_sweep(folder: SweepFolder) -> Sweep:
    """Read a sweep's folder once. Never fails on missing, empty or torn files."""
    notes: list[str] = []
    plan, outcome = facts_in(folder.plan, notes), facts_in(folder.outcome, notes)
    log = open_log(folder)
    if log.unreadable:
        notes.append(f"{log.unreadable} records of {folder.log.name} make no sense")
    rungs = tuple(plan.get("rungs") or ())
    trials = [_trial(folder.trial(t.id), t, log, rungs, notes) for t in log.trials.values()]
    return Sweep(
        name=folder.name,
        plan=plan,
        outcome=outcome,
        log=log,
        records=_timed(read_records(folder.log)),
        trials=trials,
        slots=_timed(read_records(folder.slots)),
        events=_timed(read_records(folder.events)),
        best_job=_text(folder.best),
        job_text=_text(folder.spec),
        notes=notes,
    )


def _trial(
    folder: RunFolder, state: TrialState, log: SweepLog, rungs: tuple[int, ...], notes: list[str]
) -> TrialRun:
    steps, evals = _stepped(read_records(folder.steps)), _stepped(read_records(folder.evals))
    events = _timed(read_records(folder.events))
    waited = _total(steps, "wait_s")
    once = {r["step"]: r for r in steps}
    figures = {r["step"]: finite(r.get(log.metric.name)) for r in evals}
    figures |= {step: finite(log.value(state, step)) for step in state.reports}
    times = [t for r in (*steps, *evals, *events) if (t := finite(r.get("time"))) is not None]
    return TrialRun(
        state=state,
        rungs=tuple(facts_in(folder.plan, notes).get("rungs") or rungs),
        evals=tuple((s, v) for s, v in sorted(figures.items()) if v is not None),
        losses=_losses([once[step] for step in sorted(once)]),
        last_step=max((*once, *figures), default=0),
        attempts=attempts([float(e["time"]) for e in events if e["kind"] == "find"], times),
        train_s=max(_total(steps, "step_s") - waited, 0.0),
        wait_s=waited,
        eval_s=_total(evals, "eval_s"),
        tokens=_total(list(once.values()), "tokens"),
    )


def _losses(steps: Sequence[Facts]) -> tuple[tuple[float, float | None], ...]:
    x, y = [float(r["step"]) for r in steps], [finite(r.get("loss")) for r in steps]
    return tuple(zip(*thinned(x, y, MOST_CURVE_POINTS), strict=True))


def attempts(starts: list[float], times: list[float]) -> tuple[tuple[float, float], ...]:
    """(when it began, the last of `times` before the next one began) of each start."""
    bounds = zip(starts, [*starts[1:], math.inf], strict=False)
    return tuple((a, max((t for t in times if a <= t < b), default=a)) for a, b in bounds)


def _stepped(records: Sequence[Facts]) -> list[Facts]:
    return [r for r in records if isinstance(r.get("step"), int)]


def _timed(records: Sequence[Facts]) -> list[Facts]:
    return [r for r in records if finite(r.get("time")) is not None and "kind" in r]


def _total(records: Sequence[Facts], name: str) -> float:
    return sum(finite(r.get(name)) or 0.0 for r in records)


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""
