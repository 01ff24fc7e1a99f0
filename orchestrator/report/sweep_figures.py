"""Charts of a sweep over its steps and its time: curves of all trials, slots, compute."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.report.drawing import EVALUATED, INK, Chart, Numbers, built, chart_of, star
from orchestrator.report.records import finite
from orchestrator.report.slot_time import COLORS, Launch, Span, running_s
from orchestrator.report.sweep_stats import Sweep, TrialRun
from orchestrator.report.text import duration, metric_text

LOOKS = {
    "finished": "#2563eb", "pruned": "#94a3b8", "generation ended": "#64748b", "failed": "#dc2626",
    "running": "#0891b2", "unfinished": "#a16207", "lost": "#b91c1c",
}  # fmt: skip
"""What becomes of a trial, in words, and its color."""
BEST = EVALUATED
IDLE = "#fde2e2"
MOST_BAR_SLOTS = 40
"""Slots whose bars get a full line each."""
COMPUTE = ("training", "waiting for data", "evaluation", "models, saves, decisions")


def look(sweep: Sweep, trial: TrialRun) -> str:
    """How a trial stands, as a key of LOOKS."""
    if trial.failed:
        return "failed"
    if trial.state.status is None:
        return "running" if sweep.under_way else "unfinished"
    if trial.state.status == "pruned" and sweep.scheduler == "pbt":
        return "generation ended"
    return str(trial.state.status)


def spread(values: Iterable[float | None]) -> bool:
    """Whether positive values differ so much that a linear axis would hide most of them."""
    known = sorted(v for v in values if v is not None)
    return bool(known) and known[0] > 0 and known[-1] > 20 * known[len(known) // 2]


def curves_chart(sweep: Sweep) -> Chart | None:
    """The sweep's metric over the steps of every trial, with the rungs marked."""
    lines = {t.id: _with_parent(sweep, t) for t in sweep.trials}
    best = sweep.best
    traces = _many_lines(sweep, lines, 5)
    if best is not None:
        x, y = [p[0] for p in lines[best.id]], [p[1] for p in lines[best.id]]
        traces.append(_lines("best: " + best.id, x, y, [best.id] * len(x), BEST, 2.5, 6))
        traces += [star(s, v) for s, v in best.evals if v == best.state.best][:1]
    note = "Every line is a trial; a line that ends early was stopped there."
    note += " Upright lines are rungs, where trials are compared." if sweep.rungs else ""
    log = spread(v for points in lines.values() for _, v in points)
    name = sweep.log.metric.name
    title = f"Learning curves: {name}"
    chart = chart_of("curves", title, note, traces, name, log=log, wide=True, height_px=400)
    if chart:
        _mark_rungs(chart, sweep.rungs)
    return chart


def losses_chart(sweep: Sweep) -> Chart | None:
    """Training loss of every trial, thinned."""
    lines = {t.id: t.losses for t in sweep.trials}
    traces, best = _many_lines(sweep, lines, 0), sweep.best
    if best is not None and best.losses:
        x, y = zip(*best.losses, strict=True)
        traces.append(_lines("best: " + best.id, x, y, [best.id] * len(x), BEST, 2, 0))
    note = "Of each global batch, thinned: the largest and the smallest of each stretch."
    log = spread(v for points in lines.values() for _, v in points)
    chart = chart_of("losses", "Training loss", note, traces, "loss", log=log)
    if chart:
        _mark_rungs(chart, sweep.rungs)
    return chart


def best_chart(sweep: Sweep) -> Chart | None:
    """The best value so far against the optimizer steps of all trials together."""
    x: list[float] = []
    y: list[float] = []
    text: list[str] = []
    reached = {t.id: t.first_step for t in sweep.trials}
    best: float | None = None
    total = 0
    for kind, trial, step in sweep.log.order:
        if kind == "report":
            total += max(step - reached[trial], 0)
            reached[trial] = max(reached[trial], step)
            value = sweep.log.value(sweep.log.trials[trial], step)
            if sweep.log.metric.is_better(value, best):
                best = value
                x.append(float(total))
                y.append(value)
                text.append(trial)
    if not x:
        return None
    x, y, text = [*x, float(total)], [*y, y[-1]], [*text, text[-1]]
    trace = _lines("best so far", x, y, text, BEST, 2, 6)
    trace.line.shape = "hv"
    name = sweep.log.metric.name
    note = "Against the steps that all trials together had taken when it was reported."
    chart = built("best", f"Best {name} so far", note, [trace], name, log=spread(y))
    chart.figure["layout"]["xaxis"]["title"]["text"] = "steps of all trials"
    chart.figure["layout"]["hovermode"] = "closest"
    return chart


def slots_chart(sweep: Sweep, runs: Sequence[Launch], taken: Sequence[Span]) -> Chart | None:
    """Which slot ran which trial when; what is left of a slot's line is idle time."""
    if not runs:
        return None
    most = max(max(run.slots for run in runs), 1 + max((s.slot for s in taken), default=0))
    scale, unit = _unit(running_s(runs, runs[-1].ended))
    held = [
        (slot, running_s(runs, run.began), run.ended - run.began, "idle")
        for run in runs
        for slot in range(run.slots)
    ]
    traces = [_bars("idle", held, IDLE, scale)]
    by_id = {t.id: t for t in sweep.trials}
    kinds: dict[str, list[tuple[int, float, float, str]]] = {}
    for span in taken:
        trial = by_id.get(span.trial)
        kind = look(sweep, trial) if trial and span.kind == "ran" else span.kind
        kind = "lost" if kind == "ran" else kind
        began, ended = running_s(runs, span.began), running_s(runs, span.ended)
        text = f"{html.escape(span.trial)}, {kind}, {duration(ended - began)}"
        kinds.setdefault(kind, []).append((span.slot, began, ended - began, text))
    traces += [_bars(kind, kinds[kind], LOOKS[kind], scale) for kind in LOOKS if kind in kinds]
    note = "Time between two launches is left out."
    note += " Upright lines are resumes." if len(runs) > 1 else ""
    if any(s.kind != "ran" for s in taken):
        note += " Trials that are running, and those lost with their workers, stand in a slot that was free."
    height = 110 + (26 if most <= MOST_BAR_SLOTS else 8) * most
    chart = built("slots", "Slots", note, traces, "slot", wide=True, height_px=max(190, height))
    layout = chart.figure["layout"]
    layout["xaxis"].update(title={"text": unit}, range=[0, running_s(runs, runs[-1].ended) / scale])
    layout["yaxis"].update(autorange="reversed", dtick=max(1, most // 20), showgrid=False)
    resumed = [running_s(runs, run.began) / scale for run in runs[1:]]
    shapes = [_upright(x, "solid", INK) for x in resumed]
    layout.update(barmode="overlay", bargap=0.2, hovermode="closest", shapes=shapes)
    return chart


def compute_chart(sweep: Sweep, taken: Sequence[Span]) -> Chart | None:
    """Seconds in a slot of every trial, by what they went to."""
    import plotly.graph_objects as go

    held: dict[str, float] = {}
    for span in taken:
        held[span.trial] = held.get(span.trial, 0.0) + span.ended - span.began
    trials = [t for t in sweep.trials if t.id in held]
    if not trials:
        return None
    parts = [compute_of(t, held[t.id]) for t in trials]
    scale, unit = _unit(max(held.values()))
    ids = [html.escape(t.id) for t in trials]
    bars = [
        go.Bar(
            x=ids, y=[p[name] / scale for p in parts], name=name, marker_color=COLORS[name],
            text=[f"{i}: {name} {duration(p[name])}" for i, p in zip(ids, parts, strict=True)],
            textposition="none", hovertemplate="%{text}<extra></extra>",
        )
        for name in COMPUTE
    ]  # fmt: skip
    note = "Time in a slot, in the order the trials were proposed."
    chart = built("compute", "Compute per trial", note, bars, unit, wide=len(trials) > 20)
    chart.figure["layout"].update(barmode="stack", bargap=0.15, hovermode="closest")
    chart.figure["layout"]["xaxis"].update(
        title={"text": ""}, type="category", showgrid=False, nticks=20
    )
    return chart


def compute_of(trial: TrialRun, held_s: float) -> dict[str, float]:
    """Seconds of one trial by what they went to, of `held_s` in a slot."""
    known = (trial.train_s, trial.wait_s, trial.eval_s)
    return dict(zip(COMPUTE, (*known, max(held_s - sum(known), 0.0)), strict=True))


def _with_parent(sweep: Sweep, trial: TrialRun) -> list[tuple[float, float | None]]:
    """A trial's evaluations; before them, where its parent's checkpoint stood."""
    own: list[tuple[float, float | None]] = [(float(s), v) for s, v in trial.evals]
    parent = trial.state.parent
    known = sweep.log.trials.get(parent[0]) if parent else None
    if parent is None or known is None or parent[1] not in known.reports:
        return own
    return [(float(parent[1]), finite(sweep.log.value(known, parent[1]))), *own]


def _many_lines(sweep: Sweep, lines: dict[str, Any], marker: float) -> list[Any]:
    """All trials but the best, one trace for each of their fates: gaps part the lines."""
    best = sweep.best
    traces = []
    for kind in LOOKS:
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for trial in sweep.trials:
            points = lines[trial.id]
            if points and look(sweep, trial) == kind and trial is not best:
                x += [*(p[0] for p in points), None]
                y += [*(p[1] for p in points), None]
                text += [trial.id] * (len(points) + 1)
        if x:
            traces.append(_lines(kind, x, y, text, LOOKS[kind], 1, marker))
    return traces


def _lines(
    name: str, x: Numbers, y: Numbers, ids: Sequence[str], color: str, width: float, marker: float
) -> Any:
    import plotly.graph_objects as go

    words = [
        f"{html.escape(i)}, step {a:,.0f}: {metric_text(b)}"
        if a is not None and b is not None
        else ""
        for i, a, b in zip(ids, x, y, strict=True)
    ]
    return go.Scatter(
        x=list(x), y=list(y), name=html.escape(name), text=words, connectgaps=False,
        mode="lines+markers" if marker else "lines", hovertemplate="%{text}<extra></extra>",
        line={"color": color, "width": width}, marker={"color": color, "size": marker or 4},
    )  # fmt: skip


def _bars(
    name: str, rows: Sequence[tuple[int, float, float, str]], color: str, scale: float
) -> Any:
    import plotly.graph_objects as go

    return go.Bar(
        y=[r[0] for r in rows], base=[r[1] / scale for r in rows], x=[r[2] / scale for r in rows],
        text=[r[3] for r in rows], textposition="none", hovertemplate="%{text}<extra></extra>",
        name=name, orientation="h", marker={"color": color, "line": {"color": "white", "width": 0.5}},
    )  # fmt: skip


def _mark_rungs(chart: Chart, rungs: Sequence[int]) -> None:
    words = {"showarrow": False, "yref": "paper", "y": 0, "xanchor": "right", "yanchor": "bottom"}
    font = {"size": 10, "color": "#64748b"}
    chart.figure["layout"]["xaxis"]["showgrid"] = not rungs  # grid lines would cover them
    chart.figure["layout"].update(
        hovermode="closest",
        shapes=[_upright(rung, "dash", "#64748b") for rung in rungs],
        annotations=[
            {"x": rung, "text": f"rung {i}", "textangle": -90, "font": font, **words}
            for i, rung in enumerate(rungs, 1)
        ],
    )


def _upright(x: float, dash: str, color: str) -> dict[str, Any]:
    style = {"color": color, "width": 1, "dash": dash}
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", **ends, "layer": "below", "line": style}


def _unit(longest_s: float) -> tuple[float, str]:
    """(seconds per unit of an axis, its name)."""
    if longest_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest_s < 3 * 3600 else (3600.0, "hours")
