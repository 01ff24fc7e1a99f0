"""Lines, marks and layout of the report's charts, which know nothing of what they show."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report.records import finite

MEASURED, EVALUATED, EXPECTED = "#2563eb", "#d97706", "#64748b"
RESTART, CHECKPOINT = "#dc2626", "#94a3b8"
INK, GRID = "#334155", "#e2e8f0"
MOST_POINTS = 2000
"""Points drawn per line; longer lines keep the extremes of each stretch, so that spikes show."""
MOST_MARKS = 30
"""Checkpoint marks drawn at full height; more of them shrink to ticks at the foot of the chart."""
MOST_BARS = 30
"""Names along an axis that get a full line each."""

Record = Mapping[str, Any]
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """One chart: `figure` is JSON-ready `{"data": [...], "layout": {...}}`, without NaN."""

    key: str
    title: str
    note: str
    figure: dict[str, Any]
    wide: bool = False
    height_px: int = 300


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened."""

    restarts: Sequence[int] = ()
    checkpoints: Sequence[int] = ()


def column(records: Sequence[Record], name: str) -> list[float | None]:
    """One field of every record; None where it is missing or not finite."""
    return [finite(record.get(name)) for record in records]


def steps_of(records: Sequence[Record]) -> list[float]:
    """The step of every record: where a line has its points."""
    return [finite(record.get("step")) or 0.0 for record in records]


def smoothed(values: Numbers) -> list[float | None]:
    """Centered mean over a 25th of the line (at least 5 points); gaps are left out of the mean."""
    half = max(5, len(values) // 25) // 2
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    out: list[float | None] = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        count = counts[high] - counts[low]
        out.append((sums[high] - sums[low]) / count if count else None)
    return out


def thinned(
    x: Sequence[float], y: Numbers, most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """At most about `most` points: the smallest and the largest of each stretch."""
    if len(x) <= most:
        return list(x), list(y)
    stretch = -(-2 * len(x) // most)
    kept: list[int] = []
    for start in range(0, len(x), stretch):
        there = [i for i in range(start, min(start + stretch, len(x))) if y[i] is not None]
        there.sort(key=lambda i: y[i] or 0.0)
        kept.extend(sorted({there[0], there[-1]} if there else {start}))
    return [x[i] for i in kept], [y[i] for i in kept]


def raw_and_smooth(x: Sequence[float], y: Numbers, name: str) -> list[Any]:
    """A light line of the values and a dark one of their moving mean."""
    raw = line(x, y, name, MEASURED, 1, opacity=0.4)
    return raw + line(x, smoothed(y), f"{name}, mean", MEASURED, 2)


def line(
    x: Sequence[float], y: Numbers, name: str, color: str, width: float, opacity: float = 1
) -> list[Any]:
    """One line, thinned; none where there is no value."""
    import plotly.graph_objects as go

    if all(v is None for v in y):
        return []
    thin_x, thin_y = thinned(x, y)
    mode = "lines" if len(thin_x) > 1 else "markers"
    trace = go.Scatter(x=thin_x, y=thin_y, name=name, mode=mode, opacity=opacity)
    return [trace.update(line={"color": color, "width": width}, marker={"color": color})]


def dots(x: Sequence[float], y: Numbers, name: str) -> list[Any]:
    """Small dots, not joined."""
    traces = line(x, y, name, MEASURED, 1)
    for trace in traces:
        trace.update(mode="markers", marker={"size": 4, "color": MEASURED})
    return traces


def points(x: Sequence[float], y: Numbers, name: str, color: str) -> list[Any]:
    """Large dots on a line: few values, each of which counts."""
    traces = line(x, y, html.escape(name), color, 2)
    for trace in traces:
        trace.update(mode="lines+markers", marker={"size": 7, "color": color})
    return traces


def level(x: Sequence[float], y: float, name: str, color: str, dash: str = "dash") -> list[Any]:
    """A horizontal line at `y` for comparison."""
    import plotly.graph_objects as go

    ends, style = [min(x), max(x)], {"color": color, "width": 1.5, "dash": dash}
    if ends[0] == ends[1]:  # one record: a line of some length, or nothing would be seen
        ends = [ends[0] - 1, ends[0] + 1]
    return [go.Scatter(x=ends, y=[y, y], name=html.escape(name), mode="lines", line=style)]


def star(x: float, y: float) -> Any:
    """Marks the best value."""
    import plotly.graph_objects as go

    marker = {"symbol": "star", "size": 14, "color": EVALUATED}
    return go.Scatter(x=[x], y=[y], name="best", mode="markers", marker=marker, hoverinfo="skip")


def mark_shapes(marks: Marks) -> list[dict[str, Any]]:
    """Upright lines at restarts and checkpoints."""
    height = 0.05 if len(marks.checkpoints) > MOST_MARKS else 1
    dotted, solid = (
        {"color": CHECKPOINT, "width": 1, "dash": "dot"},
        {"color": RESTART, "width": 1.5},
    )
    kinds = (
        ("checkpoint", marks.checkpoints, dotted, height),
        ("restart", marks.restarts, solid, 1),
    )
    return [
        {
            "type": "line", "x0": step, "x1": step, "y0": 0, "y1": top, "yref": "paper",
            "line": style, "layer": "below", "name": name, "legendgroup": name, "showlegend": i == 0,
        }
        for name, found, style, top in kinds
        for i, step in enumerate(found)
    ]  # fmt: skip


def chart_of(
    key: str, title: str, note: str, traces: list[Any], unit: str, *,
    log: bool = False, wide: bool = False, height_px: int = 300,
) -> Chart | None:  # fmt: skip
    """A chart over steps, or None where there is nothing to draw."""
    if not traces:
        return None
    return built(key, title, note, traces, unit, log=log, wide=wide, height_px=height_px)


def built(
    key: str, title: str, note: str, traces: list[Any], unit: str, *,
    log: bool = False, wide: bool = False, height_px: int = 300,
) -> Chart:  # fmt: skip
    """A chart of `traces`, over steps unless its axes are changed afterwards."""
    import plotly.graph_objects as go

    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    logarithmic = {"type": "log", "dtick": 1, "exponentformat": "none"} if log else {}
    layout = go.Layout(
        template="none", autosize=True, hovermode="x unified",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        margin={"l": 48, "r": 12, "t": 8, "b": 40}, paper_bgcolor="white", plot_bgcolor="white",
        xaxis={**axis, "title": {"text": "step", "standoff": 8}},
        yaxis={**axis, "title": {"text": unit, "standoff": 6}, **logarithmic},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        showlegend=sum(bool(t.name) for t in traces) > 1,
    )  # fmt: skip
    figure = go.Figure(data=traces, layout=layout).to_plotly_json()
    return Chart(key, title, note, figure, wide, height_px)


def named_axis(names: Sequence[str]) -> dict[str, Any]:
    """Axis settings that write names at 0, 1, 2, …; equal names stay apart.

    plotly reads some HTML in texts; escaped, a name shows as it was written.
    """
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [html.escape(name) for name in short]}
    return {"tickmode": "array", "showgrid": False, **ticks}


def tall(names: Sequence[str]) -> int:
    """Height in pixels that gives each of `names` a line."""
    return max(320, 100 + (24 if len(names) <= MOST_BARS else 14) * len(names))
