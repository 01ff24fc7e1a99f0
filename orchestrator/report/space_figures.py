"""Charts of what was searched: the metric against each field, all fields at once, importance."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.drawing import MEASURED, Chart, built, named_axis, tall
from orchestrator.report.records import finite
from orchestrator.report.run import Facts
from orchestrator.report.sweep_figures import BEST, LOOKS, look, spread
from orchestrator.report.sweep_stats import Sweep, TrialRun
from orchestrator.report.text import metric_text, shown

MOST_LINES = 400
"""Trials drawn in parallel coordinates: the best of them."""
NOT_SET = -0.12
"""Where a line passes an axis whose field a trial does not have."""
MOST_TICKS = 8
Ticks = list[tuple[float, str]]


def field_charts(sweep: Sweep) -> list[Chart]:
    """The best value of each trial against each searched field."""
    drawn = (_field_chart(sweep, path, d) for path, d in sweep.dimensions().items())
    return [chart for chart in drawn if chart]


def _field_chart(sweep: Sweep, path: str, dimension: Facts) -> Chart | None:
    import plotly.graph_objects as go

    known = [t for t in sweep.trials if t.state.best is not None and path in t.state.values]
    choices = [shown(v) for v in dimension.get("values") or []]
    traces = []
    for kind in LOOKS:
        mine = [t for t in known if look(sweep, t) == kind]
        x = [_along(t, path, choices) for t in mine]
        marker = {"size": 7, "color": LOOKS[kind], "opacity": 0.75}
        if kind == "pruned":
            marker["symbol"] = "circle-open"
        if any(v is not None for v in x):
            traces.append(
                go.Scatter(
                    x=x, y=[t.state.best for t in mine], name=kind, mode="markers", marker=marker,
                    text=[trial_words(sweep, t) for t in mine], hovertemplate="%{text}<extra></extra>",
                )
            )  # fmt: skip
    if not traces:
        return None
    best = sweep.best
    if best is not None and best in known:
        marker = {"symbol": "star", "size": 14, "color": BEST}
        at = [_along(best, path, choices)], [best.state.best]
        traces.append(
            go.Scatter(
                x=at[0], y=at[1], name="best", mode="markers", marker=marker, hoverinfo="skip"
            )
        )
    log_y = spread(t.state.best for t in known)
    note = "The best value of each trial."
    if any(t.state.status == "pruned" for t in known):
        note += " Those that were stopped early had fewer steps for it."
    name = sweep.log.metric.name
    chart = built(f"field-{path}", path, note, traces, name, log=log_y)
    layout = chart.figure["layout"]
    layout["xaxis"]["title"]["text"] = html.escape(path)
    layout["hovermode"] = "closest"
    if choices:
        layout["xaxis"].update(named_axis(choices), range=[-0.6, len(choices) - 0.4])
    elif dimension.get("type") == "log_uniform":
        wide = dimension["high"] > 100 * dimension["low"]
        layout["xaxis"].update(type="log", dtick=1 if wide else "D2", exponentformat="power")
    return chart


def _along(trial: TrialRun, path: str, choices: Sequence[str]) -> float | None:
    """Return a trial's position along a field's axis. Choices are drawn a little apart."""
    value = trial.state.values.get(path)
    if not choices:
        return finite(value)
    if shown(value) not in choices:
        return None
    return choices.index(shown(value)) + (trial.state.index * 0.618 % 1 - 0.5) * 0.4


def parallel_chart(sweep: Sweep) -> Chart | None:
    """All searched fields at once: a line per trial, the metric last.

    Drawn with plain lines: plotly's own chart of this kind compiles WebGL programs from text, which the
    page's policy forbids, and a browser may not have WebGL at all.
    """
    import plotly.graph_objects as go

    ranked = [t for t in sweep.ranked() if t.state.best is not None][:MOST_LINES]
    dimensions = {p: d for p, d in sweep.dimensions().items() if any(p in t.state.values for t in ranked)}  # fmt: skip
    if len(ranked) < 2 or not dimensions:
        return None
    axes = [_axis(p, d, ranked) for p, d in dimensions.items()]
    places, ticks = _metric_axis(sweep, ranked)
    axes.append((places, ticks))
    traces = []
    for name, trials, color, width in reversed(_classes(ranked)):
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for trial in trials:
            x += [*range(len(axes)), None]
            y += [*(at.get(trial.id, NOT_SET) for at, _ in axes), None]
            text += [trial_words(sweep, trial)] * (len(axes) + 1)
        traces.append(
            go.Scatter(
                x=x, y=y, name=name, mode="lines", text=text, hovertemplate="%{text}<extra></extra>",
                line={"color": color, "width": width},
            )
        )  # fmt: skip
    note = "A line is a trial. Below an axis: the trial does not have that field."
    if len(ranked) < sum(t.state.best is not None for t in sweep.trials):
        note += f" The best {MOST_LINES} trials."
    chart = built("parallel", "Parallel coordinates", note, traces, "", wide=True, height_px=420)
    _dress(chart.figure["layout"], [*dimensions, sweep.log.metric.name], [t for _, t in axes])
    return chart


def _classes(ranked: Sequence[TrialRun]) -> list[tuple[str, Sequence[TrialRun], str, float]]:
    """(name, trials, color, width), best first."""
    tenth, half = max(2, math.ceil(len(ranked) / 10)), max(2, math.ceil(len(ranked) / 2))
    found = [
        (f"best: {html.escape(ranked[0].id)}", ranked[:1], BEST, 3.0),
        ("best tenth", ranked[1:tenth], MEASURED, 1.5),
        ("better half", ranked[tenth:half], "#93c5fd", 1.0),
        ("the others", ranked[half:], "#cbd5e1", 1.0),
    ]
    return [one for one in found if one[1]]


def _axis(
    path: str, dimension: Facts, trials: Sequence[TrialRun]
) -> tuple[dict[str, float], Ticks]:
    """(trial → place between 0 and 1, ticks) of one field."""
    if dimension.get("type") == "choice":
        choices = [shown(v) for v in dimension["values"]]
        step = 1 / max(len(choices) - 1, 1)
        at = {c: i * step if len(choices) > 1 else 0.5 for i, c in enumerate(choices)}
        named = {t.id: shown(t.state.values[path]) for t in trials if path in t.state.values}
        placed = {i: at[name] for i, name in named.items() if name in at}
        some = list(at.items())[:: max(1, math.ceil(len(at) / MOST_TICKS))]
        return placed, [(place, name) for name, place in some]
    known = {t.id: v for t in trials if (v := finite(t.state.values.get(path))) is not None}
    return _placed(known, dimension["low"], dimension["high"], dimension["type"] == "log_uniform")


def _metric_axis(sweep: Sweep, trials: Sequence[TrialRun]) -> tuple[dict[str, float], Ticks]:
    known = {t.id: t.state.best for t in trials if t.state.best is not None}
    return _placed(known, min(known.values()), max(known.values()), spread(known.values()))


def _placed(
    values: Mapping[str, float], low: float, high: float, log: bool
) -> tuple[dict[str, float], Ticks]:
    log = log and low > 0
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    if a == b:
        return dict.fromkeys(values, 0.5), [(0.5, f"{low:.3g}")]
    width = b - a
    at = {i: ((math.log(v) if log and v > 0 else v) - a) / width for i, v in values.items()}
    ends = [a + width * k / 4 for k in range(5)]
    return at, [(k / 4, f"{math.exp(e) if log else e:.3g}") for k, e in enumerate(ends)]


def _dress(layout: dict[str, Any], names: Sequence[str], ticks: Sequence[Ticks]) -> None:
    """Upright axes with their own ticks instead of the chart's."""
    layout["xaxis"].update(
        named_axis([n.rpartition(".")[2] for n in names]), title={"text": ""},
        range=[-0.35, len(names) - 0.65], zeroline=False, showline=False,
    )  # fmt: skip
    layout["yaxis"].update(visible=False, range=[-0.17, 1.06])
    layout["shapes"] = [
        {
            "type": "line",
            "x0": i,
            "x1": i,
            "y0": 0,
            "y1": 1,
            "line": {"color": "#334155", "width": 1},
        }
        for i in range(len(names))
    ]
    layout["annotations"] = [
        {
            "x": i, "y": place, "text": html.escape(text[:14]), "showarrow": False, "xshift": -3,
            "xanchor": "right", "font": {"size": 10, "color": "#475569"},
            "bgcolor": "rgba(255,255,255,0.75)",
        }
        for i, of_axis in enumerate(ticks)
        for place, text in of_axis
    ]  # fmt: skip
    layout["hovermode"] = "closest"


def importance_chart(importance: Mapping[str, float], note: str) -> Chart | None:
    """Share of the metric's variance that each field accounts for."""
    import plotly.graph_objects as go

    if not importance:
        return None
    ordered = sorted(importance, key=lambda p: importance[p], reverse=True)
    values = [importance[p] for p in ordered]
    bar = go.Bar(
        x=values, orientation="h", marker_color=MEASURED, text=[f"{v:.0%}" for v in values],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    height = min(tall(ordered), 90 + 32 * len(ordered) + 60)
    chart = built("importance", "Importance", note, [bar], "", height_px=max(height, 220))
    chart.figure["layout"]["yaxis"].update(named_axis(ordered), autorange="reversed")
    chart.figure["layout"]["xaxis"].update(
        title={"text": "share"}, rangemode="tozero", tickformat=".0%"
    )
    chart.figure["layout"]["hovermode"] = "closest"
    return chart


def trial_words(sweep: Sweep, trial: TrialRun) -> str:
    """Return the hover text of a trial."""
    best = (
        ""
        if trial.state.best is None
        else f"{sweep.log.metric.name} {metric_text(trial.state.best)}"
    )
    lines = [f"{trial.id}, {look(sweep, trial)} at step {trial.last_step}", best]
    lines += [f"{path} {shown(value)}" for path, value in trial.state.values.items()]
    return "<br>".join(html.escape(line) for line in lines if line)
