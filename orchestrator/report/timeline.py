"""Timeline of a run, and the parts of its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.report.records import finite
from orchestrator.report.run import Facts, Run, best_eval
from orchestrator.report.text import duration, metric_text, number

PHASES = {
    "imports": "imports",
    "model": "model",
    "engine": "engine",
    "load": "checkpoint",
    "stream": "data and first step",
    "first_step": "",
}
"""What a worker group passes through before it trains, in order."""


@dataclass(frozen=True)
class Start:
    """One coming-up of a worker group."""

    phases: list[Facts]
    idle_since: float
    """When this start began to cost time: the launch, or the last step before a worker was lost."""
    launched: bool
    """Somebody launched it; otherwise it replaced another group."""
    resized: bool
    """It replaced a healthy group of another size."""
    steps_before: list[Facts]
    """Step records of the group before it."""

    @property
    def step(self) -> int | None:
        """The step it went on from."""
        return next((e.get("step") for e in self.phases if e["kind"] == "stream"), None)

    @property
    def until_stream_s(self) -> float:
        """Seconds until it could ask for its first rows."""
        ready = [float(e["time"]) for e in self.phases if e["kind"] != "first_step"]
        return max(ready, default=self.idle_since) - self.idle_since


@dataclass(frozen=True)
class Row:
    """One line of the timeline. `time`: seconds since the epoch."""

    time: float
    what: str
    detail: str
    tone: str = ""


def starts(run: Run) -> list[Start]:
    """Each time a worker group came up, oldest first."""
    groups: list[list[Facts]] = []
    for event in run.events:
        if event["kind"] not in PHASES:
            continue
        kind, seen = event["kind"], {e["kind"] for e in groups[-1]} if groups else set()
        # "imports" begins a worker's life; a warm worker's next trial begins at "model"
        if not groups or kind == "imports" or (kind == "model" and "model" in seen):
            groups.append([])
        groups[-1].append(event)
    launches = [e["time"] for e in run.events if e["kind"] == "launch"]
    resizes = [e["time"] for e in run.events if e["kind"] == "resize"]
    found: list[Start] = []
    for group in groups:
        after, before = found[-1].phases[0]["time"] if found else 0.0, group[0]["time"]
        trained = [r for r in run.all_steps if after <= (finite(r.get("time")) or -1.0) < before]
        launched = [t for t in launches if after <= t <= before]
        resized = any(after <= t <= before for t in resizes)
        idle_since = launched[-1] if launched else trained[-1]["time"] if trained else before
        found.append(Start(group, idle_since, bool(launched) or not found, resized, trained))
    return found


def time_spent(run: Run) -> list[tuple[str, float]]:
    """Seconds by what they went to; parts that took nothing are left out."""
    kept = list({r["step"]: r for r in run.all_steps}.values())
    waited = _total(kept, "wait_s")
    parts = {
        "training": _total(kept, "step_s") - waited,
        "waiting for data": waited,
        "evaluation": _total(run.evals, "eval_s"),
        "saving checkpoints": _total([e for e in run.events if e["kind"] == "save"], "stall_s"),
        "starting up": sum(start.until_stream_s for start in starts(run)),
        "steps done again": _total(run.all_steps, "step_s") - _total(kept, "step_s"),
    }
    return [(what, seconds) for what, seconds in parts.items() if seconds > 1e-9]


def _total(records: Sequence[Facts], name: str) -> float:
    return sum(finite(r.get(name)) or 0.0 for r in records)


def timeline(run: Run) -> list[Row]:
    """Everything that happened, oldest first."""
    rows = [*_start_rows(run), *_checkpoint_rows(run), *_eval_rows(run), *_other_rows(run)]
    return sorted(rows, key=lambda row: row.time)


def _start_rows(run: Run) -> Iterator[Row]:
    restarts = 0
    for i, start in enumerate(starts(run)):
        phases, parts = start.phases, []
        if start.step is not None:
            parts.append(f"from step {number(start.step)}")
        if i:
            again = sum(r["step"] > (start.step or 0) for r in start.steps_before)
            parts.append(f"{number(again)} steps done again" if again else "no step done again")
        if phases[-1]["kind"] == "first_step":
            parts.append(f"first step after {duration(phases[-1]['time'] - start.idle_since)}")
        took = [
            f"{PHASES[one['kind']]} {duration(after['time'] - one['time'])}"
            for one, after in pairwise(phases)
        ]
        detail = ", ".join(parts) + (f" ({', '.join(took)})" if took else "")
        restarts += not start.launched and not start.resized
        what, tone = ("Launched again" if i else "Started"), "good"
        if start.resized:
            what = "Started at another size"
        elif not start.launched:
            what, tone = f"Restart {restarts}", "bad"
        yield Row(phases[0]["time"], what, detail, tone)


def _checkpoint_rows(run: Run) -> Iterator[Row]:
    stalls = {e.get("step"): e for e in run.events if e["kind"] == "save"}
    commits = [e for e in run.events if e["kind"] == "commit"]
    for event in commits:
        stall = finite(stalls.get(event.get("step"), {}).get("stall_s"))
        shown = f", training stood still for {duration(stall)}" if stall is not None else ""
        what, where = f"Checkpoint of step {event.get('step')}", event.get("folder", "")
        yield Row(event["time"], what, f"{where}{shown}")
    for step in stalls.keys() - {e.get("step") for e in commits}:
        when, what = stalls[step]["time"], f"Checkpoint of step {step}"
        yield Row(when, what, "written, never committed", "bad")


def _eval_rows(run: Run) -> Iterator[Row]:
    name, best = best_eval(run)
    for record in run.evals:
        when, value = finite(record.get("time")), finite(record.get(name))
        if when is not None:
            shown = f"{name} {metric_text(value)}" if value is not None else f"no {name}"
            if best is not None and record["step"] == best.get("step"):
                shown += ", the best"
            yield Row(when, f"Evaluation at step {record['step']}", shown)


def _other_rows(run: Run) -> Iterator[Row]:
    """Warnings, launches, ends, and kinds unknown here: their facts as they are."""
    for event in run.events:
        kind = str(event["kind"])
        if kind in PHASES or kind in ("save", "commit"):
            continue
        facts = {k: v for k, v in event.items() if k not in ("time", "kind")}
        listed = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in facts.items())
        tone = "fair" if kind == "warning" else ""
        what = kind.replace("_", " ").capitalize()
        yield Row(event["time"], what, str(facts.get("text") or listed), tone)
