"""Charts of a run as plotly figures: plain dicts that the report writes into its page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURED, EVALUATED, EXPECTED = "#2563eb", "#d97706", "#64748b"
BASELINE, RESTART, CHECKPOINT = "#059669", "#dc2626", "#94a3b8"
LINES = (EVALUATED, "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")
INK, GRID = "#334155", "#e2e8f0"
MOST_POINTS = 2000
"""Points drawn per line; longer lines keep the extremes of each stretch, so that spikes show."""
MOST_MARKS = 30
"""Checkpoint marks drawn at full height; more of them shrink to ticks at the foot of the chart."""
MOST_CELL_LABELS = 12
"""Labels up to which a confusion matrix shows its counts as text."""
MOST_BARS = 30
GIB = 2**30

Record = Mapping[str, Any]
Numbers = Sequence[float | None]
NOT_METRICS = frozenset({"step", "time", "eval_s", "rows"})


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


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def column(records: Sequence[Record], name: str) -> list[float | None]:
    """One field of every record; None where it is missing or not finite."""
    return [finite(record.get(name)) for record in records]


def scalar_metrics(evals: Sequence[Record]) -> list[str]:
    """Names of the metrics with at least one finite value, in the order of first report."""
    names = dict.fromkeys(name for record in evals for name in record if name not in NOT_METRICS)
    return [n for n in names if any(v is not None for v in column(evals, n))]


def smoothed(values: Numbers) -> list[float | None]:
    """Centred mean over a 25th of the line (at least 5 points); gaps are left out of the mean."""
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


def thinned(x: Sequence[float], y: Numbers) -> tuple[list[float], list[float | None]]:
    """At most about MOST_POINTS points: the smallest and the largest of each stretch."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    stretch = -(-2 * len(x) // MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(x), stretch):
        there = [i for i in range(start, min(start + stretch, len(x))) if y[i] is not None]
        there.sort(key=lambda i: y[i] or 0.0)
        kept.extend(sorted({there[0], there[-1]} if there else {start}))
    return [x[i] for i in kept], [y[i] for i in kept]


def loss_chart(steps: Sequence[Record], evals: Sequence[Record]) -> Chart | None:
    """Training loss per step, raw and smoothed, with the evaluation loss on it."""
    x, y = _xs(steps), column(steps, "loss")
    traces = _raw_and_smooth(x, y, "train")
    traces += _points(_xs(evals), column(evals, "loss"), "evaluation", EVALUATED)
    note = "Mean loss per target of each global batch, light; its moving mean, dark."
    return _chart("loss", "Loss", note, traces, "loss", wide=True, height_px=360)


def metric_charts(
    evals: Sequence[Record], best: tuple[str, int] | None, baseline: Mapping[str, Any]
) -> list[Chart]:
    """Every scalar metric but the loss: those between 0 and 1 together, each other one alone.

    `best`: the metric that chooses the model and its best step. `baseline`: metric → value.
    """
    names = [n for n in scalar_metrics(evals) if n != "loss"]
    scores = [n for n in names if all(v is None or 0 <= v <= 1 for v in column(evals, n))]
    groups = [scores] if scores else []
    groups += [[n] for n in names if n not in scores]
    charts = (_metric_chart(evals, group, best, baseline) for group in groups)
    return [chart for chart in charts if chart]


def _metric_chart(
    evals: Sequence[Record],
    names: Sequence[str],
    best: tuple[str, int] | None,
    baseline: Mapping[str, Any],
) -> Chart | None:
    x, traces, chosen = _xs(evals), [], best[0] if best else None
    ordered = sorted(names, key=lambda n: n != chosen)
    for i, name in enumerate(ordered):
        traces += _points(x, column(evals, name), name, LINES[i % len(LINES)])
    for name in ordered:
        reference = finite(baseline.get(name))
        if reference is not None and (name == chosen or len(names) == 1):
            traces += _level(x, reference, f"{name}, baseline", BASELINE)
    if best and chosen in names:
        at_best = [(s, v) for s, v in zip(x, column(evals, best[0]), strict=True) if s == best[1]]
        traces += [_star(s, v) for s, v in at_best[:1] if v is not None]
    title = "Evaluation metrics" if len(names) > 1 else f"Evaluation: {names[0]}"
    key = "metrics" if len(names) > 1 else f"metric-{names[0]}"
    note = "On the evaluation rows, every row once."
    return _chart(key, title, note, traces, "", wide=len(names) > 1)


def throughput_chart(steps: Sequence[Record], marks: Marks) -> Chart | None:
    """Tokens per second of each step, with restarts and checkpoints marked."""
    rates = [
        tokens / seconds if tokens is not None and seconds else None
        for tokens, seconds in zip(column(steps, "tokens"), column(steps, "step_s"), strict=True)
    ]
    note = "All workers, without padding. Waiting for data counts, evaluations and saves do not."
    traces = _raw_and_smooth(_xs(steps), rates, "tokens/s")
    chart = _chart("throughput", "Throughput", note, traces, "tokens/s")
    if chart:
        chart.figure["layout"]["shapes"] = _mark_shapes(marks)
    return chart


def wait_chart(steps: Sequence[Record]) -> Chart | None:
    """Milliseconds each step waited for its rows, on a logarithmic axis."""
    waits, whole = column(steps, "wait_s"), sum(v or 0 for v in column(steps, "step_s"))
    share = sum(v or 0 for v in waits) / whole if whole else 0.0
    note = f"Time a step waited for its rows: {share:.1%} of all step time."
    shown = [1000 * v if v else None for v in waits]  # a logarithmic axis has no zero
    traces = _dots(_xs(steps), shown, "wait")
    return _chart("wait", "Waiting for data", note, traces, "ms", log=True)


def rate_chart(steps: Sequence[Record]) -> Chart | None:
    """Learning rate per step."""
    traces = _line(_xs(steps), column(steps, "lr"), "learning rate", MEASURED, 2)
    chart = _chart("lr", "Learning rate", "As set for each step.", traces, "")
    if chart:
        chart.figure["layout"]["yaxis"]["exponentformat"] = "e"
    return chart


def norm_chart(steps: Sequence[Record], clipping: float | None) -> Chart | None:
    """Gradient norm per step, before clipping; `clipping` is the norm it is cut to."""
    x, y = _xs(steps), column(steps, "grad_norm")
    traces = _raw_and_smooth(x, y, "norm")
    if clipping and traces:
        traces += _level(x, clipping, "clipped above", EXPECTED)
    known = sorted(v for v in y if v)
    spread = bool(known) and known[-1] > 20 * known[len(known) // 2]
    return _chart("norm", "Gradient norm", "Before clipping.", traces, "", log=spread)


def memory_chart(
    steps: Sequence[Record], predicted_bytes: float | None, peak_bytes: float | None
) -> Chart | None:
    """Memory in use after each step, in GiB, against the predicted and the measured peak."""
    x, y = _xs(steps), [v / GIB if v is not None else None for v in column(steps, "memory_bytes")]
    traces = _line(x, y, "in use", MEASURED, 2)
    if predicted_bytes and traces:
        traces += _level(x, predicted_bytes / GIB, "predicted peak", EXPECTED)
    if peak_bytes and traces:
        traces += _level(x, peak_bytes / GIB, "measured peak", EVALUATED, dash="dot")
    note = "The first worker after each step; the peak is the largest of all workers."
    chart = _chart("memory", "Memory of a worker", note, traces, "GiB")
    if chart:
        chart.figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return chart


def confusion_chart(record: Record, labels: Sequence[str]) -> Chart | None:
    """The confusion matrix of one evaluation: rows are what is true, columns what was predicted."""
    import plotly.graph_objects as go

    counts = record.get("confusion")
    if not counts or any(len(row) != len(counts) for row in counts):
        return None
    names = [labels[i] if i < len(labels) else str(i) for i in range(len(counts))]
    totals = [max(sum(finite(n) or 0 for n in row), 1) for row in counts]
    shares = [
        [(finite(n) or 0) / total for n in row] for row, total in zip(counts, totals, strict=True)
    ]
    heat = go.Heatmap(
        z=shares, text=counts, zmin=0, zmax=1, xgap=2, ygap=2,
        colorscale=[[0, "#f1f5f9"], [1, MEASURED]], colorbar={"tickformat": ".0%", "thickness": 10},
        hovertemplate="true: %{y}<br>predicted: %{x}<br>%{text} rows, %{z:.1%}<extra></extra>",
        texttemplate="%{text}" if len(counts) <= MOST_CELL_LABELS else None,
    )  # fmt: skip
    note = f"Evaluation at step {record.get('step', '?')}. Colour: share of the true label's rows."
    chart = _built("confusion", "Confusion matrix", note, [heat], "", height_px=_tall(names))
    layout, axis = chart.figure["layout"], _named(names)
    layout["xaxis"].update(axis, title={"text": "predicted"})
    layout["yaxis"].update(axis, title={"text": "true"}, autorange="reversed")
    layout["hovermode"] = "closest"
    return chart


def per_label_chart(record: Record) -> Chart | None:
    """F1 of each label at one evaluation, the weakest on top."""
    import plotly.graph_objects as go

    scores = record.get("f1_per_class")
    if not isinstance(scores, Mapping) or not scores:
        return None
    ordered = sorted(scores.items(), key=lambda item: finite(item[1]) or 0.0)[:MOST_BARS]
    names, values = [str(name) for name, _ in ordered], [finite(v) for _, v in ordered]
    bar = go.Bar(
        x=values, orientation="h", marker_color=EVALUATED,
        text=[f"{v:.3f}" if v is not None else "–" for v in values],
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )  # fmt: skip
    which = "The weakest first" if len(scores) <= MOST_BARS else f"The {MOST_BARS} weakest"
    note = f"{which}; evaluation at step {record.get('step', '?')}."
    chart = _built("f1", "F1 per label", note, [bar], "", height_px=_tall(names))
    chart.figure["layout"]["yaxis"].update(autorange="reversed", **_named(names))
    chart.figure["layout"]["xaxis"].update(title={"text": "F1"}, range=[0, 1.02])
    chart.figure["layout"].update(hovermode="closest", bargap=0.35)
    return chart


def _named(names: Sequence[str]) -> dict[str, Any]:
    """Axis settings that write names at 0, 1, 2, …; equal names stay apart.

    plotly reads some HTML in texts; escaped, a name shows as it was written.
    """
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [html.escape(name) for name in short]}
    return {"tickmode": "array", "showgrid": False, **ticks}


def _tall(names: Sequence[str]) -> int:
    """Height in pixels that gives each of `names` a line."""
    return max(320, 100 + (24 if len(names) <= MOST_BARS else 14) * len(names))


def _xs(records: Sequence[Record]) -> list[float]:
    return [finite(record.get("step")) or 0.0 for record in records]


def _raw_and_smooth(x: Sequence[float], y: Numbers, name: str) -> list[Any]:
    raw = _line(x, y, name, MEASURED, 1, opacity=0.4)
    return raw + _line(x, smoothed(y), f"{name}, mean", MEASURED, 2)


def _line(
    x: Sequence[float], y: Numbers, name: str, colour: str, width: float, opacity: float = 1
) -> list[Any]:
    import plotly.graph_objects as go

    if all(v is None for v in y):
        return []
    thin_x, thin_y = thinned(x, y)
    mode = "lines" if len(thin_x) > 1 else "markers"
    trace = go.Scatter(x=thin_x, y=thin_y, name=name, mode=mode, opacity=opacity)
    return [trace.update(line={"color": colour, "width": width}, marker={"color": colour})]


def _dots(x: Sequence[float], y: Numbers, name: str) -> list[Any]:
    traces = _line(x, y, name, MEASURED, 1)
    for trace in traces:
        trace.update(mode="markers", marker={"size": 4, "color": MEASURED})
    return traces


def _points(x: Sequence[float], y: Numbers, name: str, colour: str) -> list[Any]:
    traces = _line(x, y, html.escape(name), colour, 2)
    for trace in traces:
        trace.update(mode="lines+markers", marker={"size": 7, "color": colour})
    return traces


def _level(x: Sequence[float], y: float, name: str, colour: str, dash: str = "dash") -> list[Any]:
    import plotly.graph_objects as go

    ends, line = [min(x), max(x)], {"color": colour, "width": 1.5, "dash": dash}
    if ends[0] == ends[1]:  # one record: a line of some length, or nothing would be seen
        ends = [ends[0] - 1, ends[0] + 1]
    return [go.Scatter(x=ends, y=[y, y], name=html.escape(name), mode="lines", line=line)]


def _star(x: float, y: float) -> Any:
    import plotly.graph_objects as go

    marker = {"symbol": "star", "size": 14, "color": EVALUATED}
    return go.Scatter(x=[x], y=[y], name="best", mode="markers", marker=marker, hoverinfo="skip")


def _mark_shapes(marks: Marks) -> list[dict[str, Any]]:
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
            "line": line, "layer": "below", "name": name, "legendgroup": name, "showlegend": i == 0,
        }
        for name, found, line, top in kinds
        for i, step in enumerate(found)
    ]  # fmt: skip


def _chart(
    key: str, title: str, note: str, traces: list[Any], unit: str, *,
    log: bool = False, wide: bool = False, height_px: int = 300,
) -> Chart | None:  # fmt: skip
    """A chart over steps, or None where there is nothing to draw."""
    if not traces:
        return None
    return _built(key, title, note, traces, unit, log=log, wide=wide, height_px=height_px)


def _built(
    key: str, title: str, note: str, traces: list[Any], unit: str, *,
    log: bool = False, wide: bool = False, height_px: int = 300,
) -> Chart:  # fmt: skip
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
