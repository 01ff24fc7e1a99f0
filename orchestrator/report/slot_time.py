"""Use of time by the slots of a sweep, from their records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from orchestrator.report.page import Share
from orchestrator.report.records import finite
from orchestrator.report.sweep_stats import Sweep

STARTING, BETWEEN, AFTER = "slots starting up", "between trials", "nothing left to run"
COLORS = {
    "training": "#2563eb", "waiting for data": "#7c3aed", "evaluation": "#d97706",
    "models, saves, decisions": "#0891b2", STARTING: "#94a3b8", BETWEEN: "#dc2626", AFTER: "#cbd5e1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One time that the sweep ran; times in seconds since the epoch."""

    began: float
    ended: float
    slots: int


@dataclass(frozen=True)
class Span:
    """A trial in a slot. `lost`: its end was never recorded, and its workers are gone."""

    slot: int
    trial: str
    began: float
    ended: float
    kind: Literal["ran", "lost", "running"] = "ran"


def launches(sweep: Sweep) -> list[Launch]:
    """Every launch; it ends with the last thing that anybody wrote down before the next one."""
    marks = [e for e in sweep.events if e["kind"] == "launch"]
    words = [float(r["time"]) for r in (*sweep.events, *sweep.records, *sweep.slots)]
    words += [ended for t in sweep.trials for _, ended in t.attempts]
    bounds = [*(float(e["time"]) for e in marks), math.inf]
    found = []
    for mark, (began, until) in zip(marks, pairwise(bounds), strict=True):
        slots = int(finite(mark.get("slots")) or finite(sweep.plan.get("slots")) or 1)
        last = max((t for t in words if began <= t < until), default=began)
        found.append(Launch(began, last, slots))
    return found


def running_s(runs: Sequence[Launch], time: float) -> float:
    """Seconds that the sweep had run at `time`; what lies between two launches does not count."""
    return sum(max(min(time, run.ended) - run.began, 0.0) for run in runs)


def spans(sweep: Sweep, runs: Sequence[Launch]) -> list[Span]:
    """Every trial in every slot, oldest first.

    A slot notes a trial when it has let go of it. One that it still holds, or that was killed with it, is
    known from the trial's own records, and shown in a slot that was free then.
    """
    found, by_trial = list(_recorded(sweep)), defaultdict(list)
    for span in found:
        by_trial[span.trial].append(span)
    for trial in sweep.trials:
        for i, (began, ended) in enumerate(trial.attempts):
            if any(s.began - 1 <= began <= s.ended for s in by_trial[trial.id]):
                continue
            last = i == len(trial.attempts) - 1 and trial.state.status is None
            kind: Literal["running", "lost"] = "running" if last and sweep.under_way else "lost"
            slot = _free_slot(found, began, ended, max((run.slots for run in runs), default=1))
            found.append(Span(slot, trial.id, began, ended, kind))
    return sorted(found, key=lambda s: s.began)


def _recorded(sweep: Sweep) -> Iterator[Span]:
    for record in sweep.slots:
        began, ended = finite(record.get("began")), finite(record.get("ended"))
        if began is not None and ended is not None and isinstance(record.get("slot"), int):
            yield Span(record["slot"], str(record.get("trial")), began, ended)


def _free_slot(taken: Sequence[Span], began: float, ended: float, slots: int) -> int:
    held = {s.slot for s in taken if s.began < ended and began < s.ended}
    return next((slot for slot in range(slots) if slot not in held), 0)


def capacity_s(runs: Sequence[Launch]) -> float:
    """Seconds that all slots together had."""
    return sum(run.slots * (run.ended - run.began) for run in runs)


def busy_s(taken: Sequence[Span]) -> float:
    """Seconds that all slots together spent on trials."""
    return sum(s.ended - s.began for s in taken)


def idle(runs: Sequence[Launch], taken: Sequence[Span]) -> dict[str, float]:
    """Seconds that slots had nothing to do, by why: starting up, between trials, none left."""
    out = dict.fromkeys((STARTING, BETWEEN, AFTER), 0.0)
    for run in runs:
        for slot in range(run.slots):
            mine = [s for s in taken if s.slot == slot and run.began <= s.began <= run.ended]
            if not mine:
                out[AFTER] += run.ended - run.began
                continue
            out[STARTING] += mine[0].began - run.began
            out[BETWEEN] += sum(max(b.began - a.ended, 0.0) for a, b in pairwise(mine))
            out[AFTER] += max(run.ended - max(s.ended for s in mine), 0.0)
    return out


def slot_shares(sweep: Sweep, runs: Sequence[Launch], taken: Sequence[Span]) -> list[Share]:
    """The slots' time by what it went to; parts that took nothing are left out."""
    parts = {
        "training": sum(t.train_s for t in sweep.trials),
        "waiting for data": sum(t.wait_s for t in sweep.trials),
        "evaluation": sum(t.eval_s for t in sweep.trials),
    }
    parts["models, saves, decisions"] = busy_s(taken) - sum(parts.values())
    parts |= idle(runs, taken)
    return [Share(what, s, COLORS[what]) for what, s in parts.items() if s > 1e-9]
