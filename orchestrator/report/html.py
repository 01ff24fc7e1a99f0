"""The report: one HTML file, readable without a network, made from what a run left in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from orchestrator.report import figures
from orchestrator.report.figures import finite
from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json, write_atomically

Facts = dict[str, Any]
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
STATUS_WORDS = {
    "finished": ("Finished", "good"),
    "stopped": ("Stopped on request", "fair"),
    "out_of_time": ("Stopped at its time limit", "fair"),
    "diverged": ("Diverged", "bad"),
    "storage_failed": ("Stopped: a checkpoint could not be written", "bad"),
}
START_PHASES = ("imports", "model", "engine", "load", "stream", "first_step")
"""What a worker group passes through before it trains, in order."""


@dataclass(frozen=True)
class Run:
    """What a run left behind. Missing files are empty values; `notes` names those that cannot be read."""

    name: str
    plan: Facts
    outcome: Facts
    baseline: Facts
    steps: list[Facts]
    """One record per step: a step that was replayed after a restart is here once."""
    all_steps: list[Facts]
    evals: list[Facts]
    events: list[Facts]
    job_text: str
    checkpoint: tuple[str, int] | None
    """Folder name and bytes of the newest committed checkpoint."""
    notes: list[str]


@dataclass(frozen=True)
class Figure:
    """One number with the words around it; `tone` is good, fair, bad or empty."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Comparison:
    """One thing the plan predicted: as text, and the measured value over the predicted one."""

    what: str
    predicted: str
    measured: str
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """One line of the timeline. `time`: seconds since the epoch."""

    time: float
    what: str
    detail: str
    tone: str = ""


def write_report(folder: RunFolder) -> Path:
    """Write `folder.report` from whatever the run left so far and return its path.

    Never fails on missing, empty or torn records: the page says what is not there.
    """
    run = read_run(folder)
    write_atomically(folder.report, render(run))
    return folder.report


def read_run(folder: RunFolder) -> Run:
    """Read a run folder once."""
    notes: list[str] = []
    steps = [r for r in read_records(folder.steps) if isinstance(r, dict) and "step" in r]
    return Run(
        name=folder.name,
        plan=_facts(folder.plan, notes),
        outcome=_facts(folder.outcome, notes),
        baseline=_facts(folder.baseline, notes),
        steps=read_steps(folder.steps),
        all_steps=steps,
        evals=read_steps(folder.evals),
        events=[e for e in read_records(folder.events) if finite(e.get("time")) is not None],
        job_text=folder.spec.read_text("utf-8", "replace") if folder.spec.exists() else "",
        checkpoint=_newest_checkpoint(folder.checkpoints),
        notes=notes,
    )


def render(run: Run) -> str:
    """The page as text. Everything that came from the run is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(bytes=bytes_text, duration=duration, clock=clock, number=number)
    template = environment.from_string(
        files(__package__).joinpath("template.html.jinja").read_text(encoding="utf-8")
    )
    status, tone = status_words(run)
    rows = timeline(run)
    return template.render(
        run=run,
        status=status,
        tone=tone,
        headline=headline(run),
        charts=charts(run),
        comparisons=comparisons(run),
        time_spent=time_spent(run),
        timeline=rows,
        began=rows[0].time if rows else None,
        predicted=_memory(run.plan),
        plotly_js=Markup(get_plotlyjs()),
    )


def status_words(run: Run) -> tuple[str, str]:
    """(how the run stands, in words; the tone to say it in)."""
    status = run.outcome.get("status")
    if status is None:
        return ("No result yet" if run.events or run.steps else "Not started", "fair")
    return STATUS_WORDS.get(status, (str(status), "fair"))


def headline(run: Run) -> list[Figure]:
    """The numbers to see first: the result against the baseline, then the cost."""
    out = [*_result_figures(run)]
    rates = sorted(
        r["tokens"] / r["step_s"] for r in run.steps if finite(r.get("tokens")) and finite(r.get("step_s"))
    )
    if rates:
        out.append(Figure("throughput", f"{number(rates[len(rates) // 2])} tokens/s", "median step, all workers"))
    facts = run.outcome.get("facts") or {}
    if (elapsed := finite(facts.get("elapsed_s"))) is not None:
        out.append(Figure("time in training", duration(elapsed), "since the first start"))
    if (peak := finite(facts.get("peak_rss_bytes"))) is not None:
        out.append(Figure("peak memory", bytes_text(peak), "the largest worker"))
    return out


def _result_figures(run: Run) -> Iterator[Figure]:
    name, best = best_eval(run)
    value = finite(best.get(name)) if best else None
    if best is None or value is None:
        if run.steps and (loss := finite(run.steps[-1].get("loss"))) is not None:
            yield Figure("train loss", metric_text(loss), f"at step {run.steps[-1]['step']}; nothing evaluated")
        return
    yield Figure(f"best {name}", metric_text(value), f"at step {number(best['step'])}", "best")
    reference = finite((run.baseline.get("metrics") or {}).get(name))
    if reference is None:
        return
    what = str(run.baseline.get("name", "baseline"))
    rows, seconds = finite(run.baseline.get("train_rows")), finite(run.baseline.get("seconds"))
    what += f", {number(rows)} rows" if rows is not None else ""
    what += f", {duration(seconds)}" if seconds is not None else ""
    yield Figure(f"baseline {name}", metric_text(reference), what)
    gain = reference - value if name in LOWER_IS_BETTER else value - reference
    words, tone = ("better", "good") if gain > 0 else ("worse", "bad") if gain < 0 else ("no difference", "fair")
    shown = f"{value - reference:+.4f}".replace("-", "−")
    yield Figure("against the baseline", shown, words, tone)


def best_eval(run: Run) -> tuple[str, Facts | None]:
    """(the metric that chooses the model, the record of the best evaluation)."""
    known = run.outcome.get("best") or (run.evals[-1] if run.evals else {})
    name = run.plan.get("metric") or ((run.plan.get("spec") or {}).get("evaluation") or {}).get("metric")
    if not name:  # a task's default metric is not in the plan
        name = "accuracy" if "accuracy" in known else "loss"
    if run.outcome.get("best"):
        return name, run.outcome["best"]
    sign = -1 if name in LOWER_IS_BETTER else 1
    usable = [r for r in run.evals if finite(r.get(name)) is not None]
    return name, max(usable, key=lambda r: sign * r[name], default=None)


def charts(run: Run) -> list[figures.Chart]:
    """Every chart there is data for."""
    name, best = best_eval(run)
    shown = best or (run.evals[-1] if run.evals else {})
    labels = [str(label) for label in run.plan.get("labels") or []]
    clipping = finite((run.plan.get("spec") or {}).get("gradient_clipping"))
    peak = finite((run.outcome.get("facts") or {}).get("peak_rss_bytes"))
    baseline = run.baseline.get("metrics") or {}
    drawn = [
        figures.loss_chart(run.steps, run.evals),
        *figures.metric_charts(run.evals, (name, best["step"]) if best else None, baseline),
        figures.confusion_chart(shown, labels),
        figures.per_label_chart(shown),
        figures.throughput_chart(run.steps, _marks(run)),
        figures.wait_chart(run.steps),
        figures.memory_chart(run.steps, sum(_memory(run.plan).values()), peak),
        figures.norm_chart(run.steps, clipping),
        figures.rate_chart(run.steps),
    ]
    return [chart for chart in drawn if chart]


def _marks(run: Run) -> figures.Marks:
    later = attempts(run.events)[1:]
    resumed = [e.get("step") for events in later for e in events if e["kind"] == "stream"]
    saved = sorted({int(e["step"]) for e in run.events if e["kind"] == "commit" and "step" in e})
    return figures.Marks([int(step) for step in resumed if step is not None], saved)


def comparisons(run: Run) -> list[Comparison]:
    """What the plan predicted beside what was measured; a dash where either is unknown."""
    peak = finite((run.outcome.get("facts") or {}).get("peak_rss_bytes"))
    size = finite(run.plan.get("checkpoint_bytes"))
    on_disk = float(run.checkpoint[1]) if run.checkpoint else None
    planned, done = finite(run.plan.get("total_steps")), float(steps_done(run))
    return [
        _compared("peak memory of a worker", float(sum(_memory(run.plan).values())) or None, peak, bytes_text),
        _compared("one checkpoint on disk", size, on_disk, bytes_text),
        _compared("optimizer steps", planned, done, number),
    ]


def _compared(what: str, predicted: float | None, measured: float | None, text: Any) -> Comparison:
    ratio = measured / predicted if predicted and measured is not None else None
    return Comparison(what, *("–" if v is None else text(v) for v in (predicted, measured)), ratio)


def steps_done(run: Run) -> int:
    """Steps that count, whatever was replayed."""
    recorded = run.steps[-1]["step"] if run.steps else 0
    return int(finite(run.outcome.get("step")) or recorded)


def attempts(events: Sequence[Facts]) -> list[list[Facts]]:
    """The starting events of each worker group, in order; one group per start or restart."""
    groups: list[list[Facts]] = []
    for event in events:
        if event["kind"] not in START_PHASES:
            continue
        again = event["kind"] == "model" and groups and any(e["kind"] == "model" for e in groups[-1])
        if not groups or again or event["kind"] == "imports":
            groups.append([])
        groups[-1].append(event)
    return groups


def time_spent(run: Run) -> list[tuple[str, float]]:
    """Seconds by what they went to, the useful part first; parts that took nothing are left out."""
    counted = {id(r) for r in _kept(run)}
    kept = [r for r in run.all_steps if id(r) in counted]
    lost = [r for r in run.all_steps if id(r) not in counted]
    waited = _total(kept, "wait_s")
    saves = [e for e in run.events if e["kind"] == "save"]
    before = [[e for e in group if e["kind"] != "first_step"] for group in attempts(run.events)]
    parts = {
        "training": _total(kept, "step_s") - waited,
        "waiting for data": waited,
        "evaluation": _total(run.evals, "eval_s"),
        "checkpoints": _total(saves, "stall_s"),
        "starting up": sum(group[-1]["time"] - group[0]["time"] for group in before if group),
        "steps done again": _total(lost, "step_s"),
    }
    return [(what, seconds) for what, seconds in parts.items() if seconds > 0]


def _kept(run: Run) -> list[Facts]:
    return list({r["step"]: r for r in run.all_steps}.values())


def timeline(run: Run) -> list[Row]:
    """Everything that happened, oldest first."""
    rows = [*_start_rows(run), *_checkpoint_rows(run), *_eval_rows(run), *_other_rows(run)]
    return sorted(rows, key=lambda row: row.time)


def _start_rows(run: Run) -> Iterator[Row]:
    groups = attempts(run.events)
    for i, group in enumerate(groups):
        last = group[-1]
        took = ", ".join(
            f"{PHASE_WORDS[one['kind']]} {duration(after['time'] - one['time'])}"
            for one, after in zip(group, group[1:], strict=False)
        )
        resumed = next((e.get("step") for e in group if e["kind"] == "stream"), None)
        parts = [f"from step {number(resumed)}"] if resumed is not None else []
        if i:
            since = groups[i - 1][0]["time"]
            before = [r for r in run.all_steps if since <= (finite(r.get("time")) or 0) < group[0]["time"]]
            again = sum(r["step"] > resumed for r in before) if resumed is not None else 0
            parts.append(f"{again} steps done again" if again else "no step done again")
            if before and last["kind"] == "first_step":
                parts.append(f"{duration(last['time'] - before[-1]['time'])} without training")
        if took:
            parts.append(took)
        yield Row(group[0]["time"], f"Restart {i}" if i else "Start", "; ".join(parts), "bad" if i else "good")
