"""Charts of a run as plotly figures: plain dicts that the report writes into its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from orchestrator.report.drawing import (
    EVALUATED,
    EXPECTED,
    MEASURED,
    MOST_BARS,
    Chart,
    Marks,
    Record,
    built,
    chart_of,
    column,
    dots,
    level,
    line,
    mark_shapes,
    named_axis,
    points,
    raw_and_smooth,
    smoothed,
    star,
    steps_of,
    tall,
)
from orchestrator.report.overfitting import overfitting_words
from orchestrator.report.records import finite

BASELINE = "#059669"
SCORES_PER_LABEL = {"f1": EVALUATED, "precision": "#7c3aed", "recall": "#0891b2"}
LINES = (EVALUATED, "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")
MOST_CELL_LABELS = 12
"""Labels up to which a confusion matrix shows its counts as text."""
GIB = 2**30
NOT_METRICS = frozenset(
    {
        "step",
        "time",
        "eval_s",
        "rows",
        "train_loss",
        "words",
        "entities",
        "questions",
        "target_tokens",
    }
)


def scalar_metrics(evals: Sequence[Record]) -> list[str]:
    """Names of the metrics with at least one finite value, in the order of first report."""
    names = dict.fromkeys(name for record in evals for name in record if name not in NOT_METRICS)
    return [n for n in names if any(v is not None for v in column(evals, n))]


def loss_chart(steps: Sequence[Record], evals: Sequence[Record]) -> Chart | None:
    """Training loss per step, raw and smoothed, with the evaluation loss on it."""
    x, y = steps_of(steps), column(steps, "loss")
    traces = raw_and_smooth(x, y, "train")
    own = smoothed(column(steps, "task_loss"))
    traces += line(x, own, "train, the task alone, mean", "#7c3aed", 2)
    traces += points(steps_of(evals), column(evals, "loss"), "evaluation", EVALUATED)
    note = "Mean loss per target of each global batch, light; its moving mean, dark."
    return chart_of("loss", "Loss", note, traces, "loss", wide=True, height_px=360)


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
    x, traces, chosen = steps_of(evals), [], best[0] if best else None
    ordered = sorted(names, key=lambda n: n != chosen)
    for i, name in enumerate(ordered):
        traces += points(x, column(evals, name), name, LINES[i % len(LINES)])
    for name in ordered:
        reference = finite(baseline.get(name))
        if reference is not None and (name == chosen or len(names) == 1):
            traces += level(x, reference, f"{name}, baseline", BASELINE)
    if best and chosen in names:
        at_best = [(s, v) for s, v in zip(x, column(evals, best[0]), strict=True) if s == best[1]]
        traces += [star(s, v) for s, v in at_best[:1] if v is not None]
    title = "Evaluation metrics" if len(names) > 1 else f"Evaluation: {names[0]}"
    key = "metrics" if len(names) > 1 else f"metric-{names[0]}"
    note = "On the evaluation rows, every row once."
    return chart_of(key, title, note, traces, "", wide=len(names) > 1)


def throughput_chart(steps: Sequence[Record], marks: Marks) -> Chart | None:
    """Tokens per second of each step, with restarts and checkpoints marked."""
    rates = [
        tokens / seconds if tokens is not None and seconds else None
        for tokens, seconds in zip(column(steps, "tokens"), column(steps, "step_s"), strict=True)
    ]
    note = "All workers, without padding. Waiting for data counts, evaluations and saves do not."
    traces = raw_and_smooth(steps_of(steps), rates, "tokens/s")
    chart = chart_of("throughput", "Throughput", note, traces, "tokens/s")
    if chart:
        chart.figure["layout"]["shapes"] = mark_shapes(marks)
    return chart


def wait_chart(steps: Sequence[Record]) -> Chart | None:
    """Milliseconds each step waited for its rows, on a logarithmic axis."""
    waits, whole = column(steps, "wait_s"), sum(v or 0 for v in column(steps, "step_s"))
    share = sum(v or 0 for v in waits) / whole if whole else 0.0
    note = f"Time a step waited for its rows: {share:.1%} of all step time."
    shown = [1000 * v if v else None for v in waits]  # a logarithmic axis has no zero
    traces = dots(steps_of(steps), shown, "wait")
    return chart_of("wait", "Waiting for data", note, traces, "ms", log=True)


def rate_chart(
    steps: Sequence[Record], planned: Sequence[Sequence[float]], lowered_by_evals: bool = False
) -> Chart | None:
    """Learning rate per step; `planned`: (step, rate) pairs of the schedule, the most there may be where
    evaluations lower the rate."""
    x, y = steps_of(steps), column(steps, "lr")
    words = _drop_words(x, y) if lowered_by_evals else _rate_words(x, y, planned)
    traces = line(x, y, "applied", MEASURED, 2)
    if traces and planned:
        ahead = line([p[0] for p in planned], [p[1] for p in planned], "planned", EXPECTED, 1.5)
        traces = ahead + traces
        for trace in ahead:
            trace.line.dash = "dash"
    chart = chart_of("lr", "Learning rate", words, traces, "")
    if chart:
        chart.figure["layout"]["yaxis"]["exponentformat"] = "e"
    return chart


def _rate_words(
    x: Sequence[float], y: Sequence[float | None], planned: Sequence[Sequence[float]]
) -> str:
    """Return how far the applied rates are from the planned ones, at steps that have both."""
    applied = dict(zip(x, y, strict=True))
    pairs = [(p[1], applied[p[0]]) for p in planned if applied.get(p[0]) is not None]
    off = sum(abs(rate - (got or 0.0)) > 1e-6 * rate for rate, got in pairs)
    if not pairs:
        return "As set for each step."
    if not off:
        return f"Applied as planned, at all {len(pairs)} steps compared."
    return f"Applied and planned differ at {off} of {len(pairs)} steps compared."


def _drop_words(x: Sequence[float], y: Sequence[float | None]) -> str:
    """At which steps evaluations that got no better lowered the rate."""
    known = [(step, rate) for step, rate in zip(x, y, strict=True) if rate is not None]
    drops = [
        f"step {step:g} to {rate:.3g}"
        for (_, before), (step, rate) in pairwise(known)
        if rate < before * (1 - 1e-6)
    ]
    if not drops:
        return "The plateau rule never lowered it."
    more = f" and {len(drops) - 5} times more" if len(drops) > 5 else ""
    return f"Lowered by the plateau rule at {', '.join(drops[:5])}{more}."


def gap_chart(evals: Sequence[Record]) -> Chart | None:
    """Evaluation loss minus training loss, at each evaluation."""
    known = [r for r in evals if None not in (finite(r.get("loss")), finite(r.get("train_loss")))]
    if len(known) < 2:
        return None
    traces = points(steps_of(known), [r["loss"] - r["train_loss"] for r in known], "gap", EVALUATED)
    return chart_of("gap", "Generalization gap", overfitting_words(known), traces, "loss")


def norm_chart(steps: Sequence[Record], clipping: float | None) -> Chart | None:
    """Gradient norm per step, before clipping; `clipping` is the norm it is cut to."""
    x, y = steps_of(steps), column(steps, "grad_norm")
    traces = raw_and_smooth(x, y, "norm")
    if clipping and traces:
        traces += level(x, clipping, "clipped above", EXPECTED)
    known = sorted(v for v in y if v)
    spread = bool(known) and known[-1] > 20 * known[len(known) // 2]
    return chart_of("norm", "Gradient norm", "Before clipping.", traces, "", log=spread)


def memory_chart(
    steps: Sequence[Record], predicted_bytes: float | None, peak_bytes: float | None
) -> Chart | None:
    """Memory in use after each step, in GiB, against the predicted and the measured peak."""
    x, y = (
        steps_of(steps),
        [v / GIB if v is not None else None for v in column(steps, "memory_bytes")],
    )
    traces = line(x, y, "in use", MEASURED, 2)
    if predicted_bytes and traces:
        traces += level(x, predicted_bytes / GIB, "predicted peak", EXPECTED)
    if peak_bytes and traces:
        traces += level(x, peak_bytes / GIB, "measured peak", EVALUATED, dash="dot")
    note = "The first worker after each step; the peak is the largest of all workers."
    chart = chart_of("memory", "Memory of a worker", note, traces, "GiB")
    if chart:
        chart.figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return chart


def confusion_chart(record: Record, labels: Sequence[str]) -> Chart | None:
    """The confusion matrix of one evaluation: lines are what is true, columns what was predicted. Where a
    row may have several labels, each has two lines: where it holds, and where it does not."""
    import plotly.graph_objects as go

    found = _confusion(record, labels)
    if found is None:
        return None
    counts, true, predicted = found
    totals = [max(sum(finite(n) or 0 for n in row), 1) for row in counts]
    shares = [
        [(finite(n) or 0) / total for n in row] for row, total in zip(counts, totals, strict=True)
    ]
    unit = "words" if "words" in record else "rows"
    heat = go.Heatmap(
        z=shares, text=counts, zmin=0, zmax=1, xgap=2, ygap=2,
        colorscale=[[0, "#f1f5f9"], [1, MEASURED]], colorbar={"tickformat": ".0%", "thickness": 10},
        hovertemplate=f"true: %{{y}}<br>predicted: %{{x}}<br>%{{text}} {unit}, %{{z:.1%}}<extra></extra>",
        texttemplate="%{text}" if len(counts) <= MOST_CELL_LABELS else None,
    )  # fmt: skip
    note = f"Evaluation at step {record.get('step', '?')}. Color: share of a line's {unit}."
    chart = built("confusion", "Confusion matrix", note, [heat], "", height_px=tall(true))
    layout = chart.figure["layout"]
    layout["xaxis"].update(named_axis(predicted), title={"text": "predicted"})
    layout["yaxis"].update(named_axis(true), title={"text": "true"}, autorange="reversed")
    layout["hovermode"] = "closest"
    return chart


def _confusion(
    record: Record, labels: Sequence[str]
) -> tuple[list[Any], list[str], list[str]] | None:
    """(counts, names of the lines, names of the columns)."""
    counts = record.get("confusion")
    if counts and all(len(row) == len(counts) for row in counts):
        names = [labels[i] if i < len(labels) else str(i) for i in range(len(counts))]
        return counts, names, names
    by_label = record.get("confusion_per_label")
    if not isinstance(by_label, Mapping) or not by_label:
        return None
    lines = [line for pair in by_label.values() for line in pair]
    return lines, [n for k in by_label for n in (k, f"not {k}")], ["predicted", "not predicted"]


def per_label_chart(record: Record) -> Chart | None:
    """Precision, recall and F1 of each label at one evaluation, the lowest F1 on top."""
    import plotly.graph_objects as go

    scores = record.get("f1_per_class")
    if not isinstance(scores, Mapping) or not scores:
        return None
    ordered = sorted(scores, key=lambda name: finite(scores[name]) or 0.0)[:MOST_BARS]
    bars = []
    for kind, color in SCORES_PER_LABEL.items():
        of_label = record.get(f"{kind}_per_class")
        if isinstance(of_label, Mapping):
            values = [finite(of_label.get(name)) for name in ordered]
            bars.append(
                go.Bar(
                    x=values, orientation="h", name=kind, marker_color=color,
                    text=[f"{v:.3f}" if v is not None else "–" for v in values],
                    hovertemplate=f"{kind} of %{{y}}: %{{x:.4f}}<extra></extra>",
                )
            )  # fmt: skip
    which = "The weakest first" if len(scores) <= MOST_BARS else f"The {MOST_BARS} weakest"
    note = f"{which}; evaluation at step {record.get('step', '?')}."
    names, height_px = [str(name) for name in ordered], 100 + 13 * len(ordered) * len(bars)
    chart = built("per-label", "Scores per label", note, bars, "", height_px=max(320, height_px))
    chart.figure["layout"]["yaxis"].update(autorange="reversed", **named_axis(names))
    chart.figure["layout"]["xaxis"].update(title={"text": "score"}, range=[0, 1.02])
    chart.figure["layout"].update(hovermode="closest", bargap=0.35, showlegend=len(bars) > 1)
    return chart
