"""The report: one HTML file, readable offline, made from what a run left in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

from orchestrator.metric import Metric
from orchestrator.report import figures
from orchestrator.report.drawing import Chart, Marks
from orchestrator.report.page import (
    Comparison,
    Figure,
    Page,
    Share,
    compared,
    render_page,
    two_to_a_row,
)
from orchestrator.report.records import finite
from orchestrator.report.run import (
    Facts,
    Run,
    best_eval,
    read_run,
    steps_done,
)
from orchestrator.report.text import bytes_text, duration, metric_text, number
from orchestrator.report.timeline import starts, time_spent, timeline
from orchestrator.run_folder import RunFolder, write_atomically

STATUS_WORDS = {
    "finished": ("Finished", "good"),
    "stopped": ("Stopped on request", "fair"),
    "diverged": ("Diverged", "bad"),
    "storage_failed": ("Stopped: a checkpoint could not be written", "bad"),
}
COLORS = {
    "training": "#2563eb", "waiting for data": "#7c3aed", "evaluation": "#d97706",
    "saving checkpoints": "#94a3b8", "starting up": "#0891b2", "steps done again": "#dc2626",
}  # fmt: skip
"""What a run's time went to, as `time_spent` names it."""


def write_report(folder: RunFolder) -> Path:
    """Write `folder.report` from whatever the run left so far and return its path.

    Never fails on missing, empty or torn records: the page says what is not there.
    """
    write_atomically(folder.report, _rendered(read_run(folder)))
    return folder.report


def _rendered(run: Run) -> str:
    """Return the page; of a run with a damaged file, the page without what that file says.

    A file may be whole and hold values that this product did not write. It is left out, with a note.
    """
    from jinja2 import UndefinedError

    wrong = (
        UndefinedError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
    )
    empty: Facts = {
        "plan": {},
        "outcome": {},
        "baseline": {},
        "teacher": {},
        "evals": [],
        "events": [],
    }
    parts = [{name: value} for name, value in empty.items()]
    for left_out in ({}, *parts, {"steps": [], "all_steps": []}):
        names = ", ".join(name for name in left_out if name != "all_steps")
        note = [f"{names}: damaged, with values of the wrong type; not shown"] if left_out else []
        with suppress(*wrong):
            return render(replace(run, **left_out, notes=[*run.notes, *note]))
    nothing = {**empty, "steps": [], "all_steps": []}
    return render(replace(run, **nothing, notes=[*run.notes, "several files are damaged"]))


def render(run: Run) -> str:
    """The page as text. Everything that came from the run is escaped."""
    status, tone = status_words(run)
    message = run.outcome.get("message")
    page = Page(
        name=run.name,
        status=status,
        tone=tone,
        callouts=[
            *([(message, tone)] if message else []),
            *((text, "") for text in run.plan.get("warnings") or []),
            *((text, "bad") for text in run.notes),
        ],
        headline=headline(run),
        shares=[Share(what, seconds, COLORS[what]) for what, seconds in time_spent(run)],
        charts=charts(run),
        comparisons=comparisons(run),
        timeline=timeline(run),
        job_text=run.job_text,
    )
    students = teacher_and_student(run)
    facts: Facts = {
        "students": students,
        "done": steps_done(run),
        "predicted": _memory(run.plan),
        "shown": shown_eval(run),
    }
    return render_page("run.html.jinja", page, run=run, **facts)


def status_words(run: Run) -> tuple[str, str]:
    """(how the run stands, in words; the tone to say it in)."""
    status = run.outcome.get("status")
    if status is None:
        return ("No result yet" if run.events or run.steps else "Not started", "fair")
    if status == "finished" and run.outcome.get("message"):
        return "Finished early", "good"  # the message says why
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
    score = Metric.named(name).score
    gain = score(value) - score(reference)
    words, tone = ("better", "good") if gain > 0 else ("worse", "bad")
    if gain == 0:
        words, tone = "no difference", "fair"
    shown = f"{value - reference:+.4f}".replace("-", "−")
    yield Figure("against the baseline", shown, words, tone)


def shown_eval(run: Run) -> Facts:
    """The evaluation that is shown in detail: the best, else the last."""
    return best_eval(run)[1] or (run.evals[-1] if run.evals else {})


def charts(run: Run) -> list[Chart]:
    """Every chart there is data for."""
    name, best = best_eval(run)
    shown = shown_eval(run)
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
        figures.rate_chart(run.steps, run.plan.get("planned_rates") or [], _has_plateau(run)),
        figures.gap_chart(run.evals),
    ]
    return two_to_a_row(drawn)


def _has_plateau(run: Run) -> bool:
    schedule = (run.plan.get("spec") or {}).get("schedule") or {}
    return bool(schedule.get("type") == "plateau")


def _marks(run: Run) -> Marks:
    resumed = [start.step for start in starts(run)[1:]]
    saved = sorted({int(e["step"]) for e in run.events if e["kind"] == "commit" and "step" in e})
    return Marks([int(step) for step in resumed if step is not None], saved)


def comparisons(run: Run) -> list[Comparison]:
    """Return predicted beside measured values; a dash for an unknown one."""
    peak = finite((run.outcome.get("facts") or {}).get("peak_memory_bytes"))
    size = finite(run.plan.get("checkpoint_bytes"))
    on_disk = float(run.checkpoint[1]) if run.checkpoint else None
    planned, done = finite(run.plan.get("total_steps")), float(steps_done(run))
    need = float(sum(_memory(run.plan).values())) or None
    return [
        compared("peak memory of a worker", need, peak, bytes_text),
        compared("one checkpoint on disk", size, on_disk, bytes_text),
        compared("optimizer steps", planned, done, number),
    ]


def teacher_and_student(run: Run) -> list[Comparison]:
    """Compare the teacher with its student: size, speed, and the metrics of both."""
    teacher, student = run.teacher.get("teacher") or {}, run.teacher.get("student") or {}
    if not teacher or not student:
        return []
    sizes = (("parameters", number), ("bytes", bytes_text))
    rows = [compared(name, *_both(teacher, student, name), text) for name, text in sizes]
    rows.append(compared("ms per row", *_both(teacher, student, "ms_per_row"), number))
    theirs, ours = teacher.get("metrics") or {}, student.get("metrics") or {}
    chosen = best_eval(run)[0]
    for name in sorted(theirs.keys() & ours.keys(), key=lambda n: (n != chosen, n)):
        rows.append(compared(name, *_both(theirs, ours, name), _metric_or_dash))
    return rows


def _both(teacher: Facts, student: Facts, name: str) -> tuple[float | None, float | None]:
    return finite(teacher.get(name)), finite(student.get(name))


def _metric_or_dash(value: float | None) -> str:
    return "–" if value is None else metric_text(value)


def _memory(plan: Facts) -> dict[str, int]:
    return dict(plan.get("memory_bytes") or {})
