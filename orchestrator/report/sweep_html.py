"""The sweep's report: one HTML file, made from what the sweep left in its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.report import space_figures, sweep_figures
from orchestrator.report.importance import importance
from orchestrator.report.lineage import lineage_chart
from orchestrator.report.page import Comparison, Figure, Page, compared, render_page, two_to_a_row
from orchestrator.report.records import finite
from orchestrator.report.run import Facts
from orchestrator.report.slot_time import (
    Launch,
    Span,
    busy_s,
    capacity_s,
    launches,
    slot_shares,
    spans,
)
from orchestrator.report.sweep_figures import look
from orchestrator.report.sweep_stats import Sweep, TrialRun, read_sweep
from orchestrator.report.text import duration, metric_text, number, shown
from orchestrator.report.timeline import Row
from orchestrator.run_folder import SweepFolder, write_atomically

STATUS_WORDS = {
    "finished": ("Finished", "good"),
    "budget": ("Ended early", "fair"),
    "stopped": ("Stopped on request", "fair"),
}
MOST_ROWS = 1000
"""Trials in the table: the best of them."""


@dataclass(frozen=True)
class TableRow:
    """One line of the table of trials."""

    trial: TrialRun
    status: str
    tone: str
    last: float | None
    values: list[str]
    held_s: float | None


@dataclass(frozen=True)
class Seen:
    """A sweep with its slots' time worked out once."""

    sweep: Sweep
    runs: list[Launch] = field(default_factory=list)
    taken: list[Span] = field(default_factory=list)


def write_sweep_report(folder: SweepFolder) -> Path:
    """Write `folder.report` from whatever the sweep left so far and return its path.

    Never fails on missing, empty or torn records: the page says what is not there.
    """
    write_atomically(folder.report, render(read_sweep(folder)))
    return folder.report


def render(sweep: Sweep) -> str:
    """The page as text. Everything that came from the sweep is escaped."""
    runs = launches(sweep)
    seen = Seen(sweep, runs, spans(sweep, runs))
    found, words = importance(sweep)
    status, tone = status_words(sweep)
    page = Page(
        name=sweep.name,
        status=status,
        tone=tone,
        callouts=list(_callouts(sweep, tone)),
        headline=list(headline(seen)),
        shares=slot_shares(sweep, runs, seen.taken),
        charts=two_to_a_row(
            [
                sweep_figures.curves_chart(sweep),
                lineage_chart(sweep),
                sweep_figures.slots_chart(sweep, runs, seen.taken),
                *space_figures.field_charts(sweep),
                space_figures.parallel_chart(sweep),
                space_figures.importance_chart(found, words),
                sweep_figures.best_chart(sweep),
                sweep_figures.losses_chart(sweep),
                sweep_figures.compute_chart(sweep, seen.taken),
            ]
        ),
        comparisons=list(comparisons(sweep)),
        timeline=timeline(sweep),
        job_text=sweep.job_text,
    )
    paths = list(sweep.dimensions())
    return render_page(
        "sweep.html.jinja", page, sweep=sweep, paths=paths, rows=table(seen, paths), most=MOST_ROWS,
        importance="" if found else words,
    )  # fmt: skip


def status_words(sweep: Sweep) -> tuple[str, str]:
    """(how the sweep stands, in words; the tone to say it in)."""
    status = sweep.outcome.get("status")
    if status is None or sweep.under_way:
        return ("No result yet" if sweep.trials else "Not started", "fair")
    return STATUS_WORDS.get(status, (str(status), "fair"))


def _callouts(sweep: Sweep, tone: str) -> Iterator[tuple[str, str]]:
    if sweep.outcome.get("message") and not sweep.under_way:
        yield str(sweep.outcome["message"]), tone
    if sweep.under_way and sweep.trials:
        yield (
            "The last launch has written no end: it is running, or it was killed. The same command goes on.",
            "",
        )
    yield from ((str(text), "") for text in sweep.plan.get("warnings") or [])
    yield from ((text, "bad") for text in sweep.notes)


def headline(seen: Seen) -> Iterator[Figure]:
    """The numbers to see first: the result, what became of the trials, what it cost."""
    sweep, best = seen.sweep, seen.sweep.best
    if best is not None and best.state.best is not None:
        at = next((s for s, v in best.evals if v == best.state.best), best.state.step)
        words = f"trial {best.id}, step {number(at)}"
        yield Figure(f"best {sweep.log.metric.name}", metric_text(best.state.best), words, "best")
    kinds = Counter(look(sweep, t) for t in sweep.trials)
    listed = " · ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    yield Figure("trials", number(len(sweep.trials)), listed)
    yield Figure("optimizer steps", number(sum(t.steps for t in sweep.trials)), saved_words(sweep))
    if room := capacity_s(seen.runs):
        share = busy_s(seen.taken) / room
        words = f"of {len(_slots(seen.runs))} slots' time, start-up included"
        yield Figure("slots busy", f"{share:.0%}", words)
        again = len(seen.runs) - 1
        words = f"{again} {'resume' if again == 1 else 'resumes'}" if again else "one launch"
        yield Figure("wall time", duration(sum(r.ended - r.began for r in seen.runs)), words)


def _slots(runs: Sequence[Launch]) -> range:
    return range(max(run.slots for run in runs))


def saved_steps(sweep: Sweep) -> int:
    """Optimizer steps that pruned trials were spared."""
    if sweep.scheduler == "pbt":
        return 0
    pruned = [t for t in sweep.trials if t.state.status == "pruned" and t.rungs]
    return sum(max(t.rungs[-1] - t.last_step, 0) for t in pruned)


def saved_words(sweep: Sweep) -> str:
    """The steps saved beside those taken."""
    saved, taken = saved_steps(sweep), sum(t.steps for t in sweep.trials)
    if not saved:
        return "all trials together"
    return f"{number(saved)} more ({saved / (saved + taken):.0%}) saved by pruning"


def comparisons(sweep: Sweep) -> Iterator[Comparison]:
    """What the plan expected beside what was: trials at each rung, trials, steps."""
    expected = list(sweep.plan.get("expected") or ())
    for i, (rung, planned) in enumerate(zip(sweep.rungs, expected, strict=False)):
        reached = sum(_reached(t, i, rung) for t in sweep.trials)
        where = "end, " if i == len(sweep.rungs) - 1 else ""
        yield compared(
            f"trials that reached {where}step {number(rung)}", finite(planned), reached, number
        )
    planned_steps = finite(sweep.plan.get("expected_steps"))
    steps = float(sum(t.steps for t in sweep.trials))
    yield compared("optimizer steps, all trials", planned_steps, steps, number)
    yield compared("trials", sweep.planned_trials, float(len(sweep.trials)), number)


def _reached(trial: TrialRun, number_of_rung: int, rung: int) -> bool:
    step = trial.rungs[number_of_rung] if number_of_rung < len(trial.rungs) else rung
    return trial.first_step < step <= trial.last_step


def table(seen: Seen, paths: Sequence[str]) -> list[TableRow]:
    """One row per trial, best first."""
    tones = {"finished": "good", "failed": "bad"}
    held: dict[str, float] = {}
    for span in seen.taken:
        held[span.trial] = held.get(span.trial, 0.0) + span.ended - span.began
    out = []
    for trial in seen.sweep.ranked()[:MOST_ROWS]:
        status, state = look(seen.sweep, trial), trial.state
        last = finite(seen.sweep.log.value(state, state.step)) if state.reports else None
        values = [shown(state.values.get(path)) for path in paths]
        name = str(state.status) if trial.failed else status
        out.append(TableRow(trial, name, tones.get(status, ""), last, values, held.get(trial.id)))
    return out


def timeline(sweep: Sweep) -> list[Row]:
    """Launches, ends, failures, and each new best, oldest first."""
    rows = [*_event_rows(sweep.events), *_log_rows(sweep)]
    return sorted(rows, key=lambda row: row.time)


def _event_rows(events: Sequence[Facts]) -> Iterator[Row]:
    launched = 0
    for event in events:
        kind = str(event["kind"])
        facts = {k: v for k, v in event.items() if k not in ("time", "kind")}
        detail = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in facts.items())
        what = kind.replace("_", " ").capitalize()
        if kind == "launch":
            what = "Resumed" if launched else "Launched"
            launched += 1
        yield Row(event["time"], what, detail, "good" if kind == "launch" else "")


def _log_rows(sweep: Sweep) -> Iterator[Row]:
    best: float | None = None
    for record in sweep.records:
        trial = sweep.log.trials.get(str(record.get("trial")))
        if trial is None:
            continue
        if record["kind"] == "report" and record.get("step") in trial.reports:
            value = sweep.log.value(trial, record["step"])
            if sweep.log.metric.is_better(value, best):
                best = value
                words = (
                    f"{sweep.log.metric.name} {metric_text(value)} at step {number(record['step'])}"
                )
                yield Row(record["time"], f"New best: {trial.id}", words)
        elif record["kind"] == "end" and record.get("status") not in ("finished", "pruned"):
            words = str(record.get("message") or "").strip().split("\n")[-1]
            yield Row(record["time"], f"{trial.id}: {record.get('status')}", words, "bad")
