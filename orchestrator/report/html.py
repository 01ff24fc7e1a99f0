"""The report: one HTML file, readable offline, made from what a run left in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
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
class Run:
    """What a run left behind. Missing files are empty values; `notes` names unreadable ones."""

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
class Start:
    """One coming-up of a worker group."""

    phases: list[Facts]
    idle_since: float
    """When this start began to cost time: the launch, or the last step before a worker was lost."""
    launched: bool
    """Somebody launched it; otherwise it replaced a group that was lost."""
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
    events = read_records(folder.events)
    return Run(
        name=folder.name,
        plan=_facts(folder.plan, notes),
        outcome=_facts(folder.outcome, notes),
        baseline=_facts(folder.baseline, notes),
        steps=read_steps(folder.steps),
        all_steps=read_records(folder.steps),
        evals=read_steps(folder.evals),
        events=[e for e in events if finite(e.get("time")) is not None and "kind" in e],
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
    environment.filters.update(
        bytes=bytes_text, duration=duration, clock=clock, number=number, pretty=pretty
    )
    template = environment.from_string(
        files(__package__).joinpath("template.html.jinja").read_text(encoding="utf-8")
    )
    status, tone = status_words(run)
    rows = timeline(run)
    return template.render(
        run=run,
        done=steps_done(run),
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
    timed = [r for r in run.steps if finite(r.get("tokens")) and finite(r.get("step_s"))]
    if timed:
        rate = median(r["tokens"] / r["step_s"] for r in timed)
        out.append(Figure("tokens per second", number(rate), "median step, all workers"))
    facts = run.outcome.get("facts") or {}
    if (elapsed := finite(facts.get("elapsed_s"))) is not None:
        words = "start-ups included, lost steps not"
        out.append(Figure("training time", duration(elapsed), words))
    if (peak := finite(facts.get("peak_memory_bytes"))) is not None:
        out.append(Figure("peak memory", bytes_text(peak), "the largest worker"))
    return out


def _result_figures(run: Run) -> Iterator[Figure]:
    name, best = best_eval(run)
    value = finite(best.get(name)) if best else None
    if best is None or value is None:
        if run.steps and (loss := finite(run.steps[-1].get("loss"))) is not None:
            when = f"at step {number(run.steps[-1]['step'])}; nothing evaluated"
            yield Figure("train loss", metric_text(loss), when)
        return
    yield Figure(f"best {name}", metric_text(value), f"at step {number(best['step'])}", "best")
    reference = finite((run.baseline.get("metrics") or {}).get(name))
    if reference is not None:
        yield from _baseline_figures(run, name, value, reference)


def _baseline_figures(run: Run, name: str, value: float, reference: float) -> Iterator[Figure]:
    what = str(run.baseline.get("name", "baseline"))
    rows, seconds = finite(run.baseline.get("train_rows")), finite(run.baseline.get("seconds"))
    what += f", {number(rows)} rows" if rows is not None else ""
    what += f", {duration(seconds)}" if seconds is not None else ""
    yield Figure(f"baseline {name}", metric_text(reference), what)
    gain = reference - value if name in LOWER_IS_BETTER else value - reference
    words, tone = ("better", "good") if gain > 0 else ("worse", "bad")
    if gain == 0:
        words, tone = "no difference", "fair"
    shown = f"{value - reference:+.4f}".replace("-", "−")
    yield Figure("against the baseline", shown, words, tone)


def best_eval(run: Run) -> tuple[str, Facts | None]:
    """(the metric that chooses the model, the record of the best evaluation)."""
    known = run.outcome.get("best") or (run.evals[-1] if run.evals else {})
    asked = ((run.plan.get("spec") or {}).get("evaluation") or {}).get("metric")
    # a task's default metric is not among the plan's fields
    name = run.plan.get("metric") or asked or ("accuracy" if "accuracy" in known else "loss")
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
    peak = finite((run.outcome.get("facts") or {}).get("peak_memory_bytes"))
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
    found = [chart for chart in drawn if chart]
    if sum(not chart.wide for chart in found) % 2:  # two to a row: the last would leave a hole
        found[-1] = replace(found[-1], wide=True)
    return found


def _marks(run: Run) -> figures.Marks:
    resumed = [start.step for start in starts(run)[1:]]
    saved = sorted({int(e["step"]) for e in run.events if e["kind"] == "commit" and "step" in e})
    return figures.Marks([int(step) for step in resumed if step is not None], saved)


def comparisons(run: Run) -> list[Comparison]:
    """What the plan predicted beside what was measured; a dash where either is unknown."""
    peak = finite((run.outcome.get("facts") or {}).get("peak_memory_bytes"))
    size = finite(run.plan.get("checkpoint_bytes"))
    on_disk = float(run.checkpoint[1]) if run.checkpoint else None
    planned, done = finite(run.plan.get("total_steps")), float(steps_done(run))
    need = float(sum(_memory(run.plan).values())) or None
    return [
        _compared("peak memory of a worker", need, peak, bytes_text),
        _compared("one checkpoint on disk", size, on_disk, bytes_text),
        _compared("optimizer steps", planned, done, number),
    ]


def _compared(
    what: str, predicted: float | None, measured: float | None, text: Callable[[Any], str]
) -> Comparison:
    ratio = measured / predicted if predicted and measured is not None else None
    return Comparison(what, text(predicted), text(measured), ratio)


def steps_done(run: Run) -> int:
    """Steps that count, whatever was replayed."""
    recorded = run.steps[-1]["step"] if run.steps else 0
    return int(finite(run.outcome.get("step")) or recorded)


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
    found: list[Start] = []
    for group in groups:
        after, before = found[-1].phases[0]["time"] if found else 0.0, group[0]["time"]
        trained = [r for r in run.all_steps if after <= (finite(r.get("time")) or -1.0) < before]
        launched = [t for t in launches if after <= t <= before]
        idle_since = launched[-1] if launched else trained[-1]["time"] if trained else before
        found.append(Start(group, idle_since, bool(launched) or not found, trained))
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
        restarts += not start.launched
        what, tone = ("Launched again" if i else "Started"), "good"
        if not start.launched:
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


def _facts(path: Path, notes: list[str]) -> Facts:
    """A JSON object; empty where the file is missing or, with a note, where it cannot be read."""
    try:
        found = read_json(path)
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _newest_checkpoint(folder: Path) -> tuple[str, int] | None:
    names = sorted(path.parent.name for path in folder.glob("step-*/COMMIT.json"))
    if not names:
        return None
    sizes = (path.stat().st_size for path in (folder / names[-1]).rglob("*") if path.is_file())
    return names[-1], sum(sizes)


def _memory(plan: Facts) -> dict[str, int]:
    return dict(plan.get("memory_bytes") or {})


def _total(records: Sequence[Facts], name: str) -> float:
    return sum(finite(r.get(name)) or 0.0 for r in records)


def metric_text(value: float) -> str:
    """Four decimals, or four digits where that is more."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.4g}"


def number(value: Any) -> str:
    """A number with thousands separated; anything else as it is, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or finite(value) is None:
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.4g}"


def bytes_text(value: Any) -> str:
    """Bytes in the binary unit that suits them."""
    size = finite(value)
    if size is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def duration(seconds: Any) -> str:
    """Seconds as people say them: 42 ms, 3.1 s, 12 min 3 s, 2 h 5 min."""
    known = finite(seconds)
    if known is None:
        return "–"
    if 0 < abs(known) < 1:
        return f"{1000 * known:.0f} ms"
    if abs(known) < 60:
        return f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """Seconds since the epoch → `2026-11-22 00:46:01` in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def pretty(value: Any) -> str:
    """JSON for reading. (jinja's own filter would mark it as safe.)"""
    return json.dumps(value, indent=2)
