"""The descent of a population: who went on from whose checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.report.drawing import Chart, built
from orchestrator.report.records import finite
from orchestrator.report.space_figures import trial_words
from orchestrator.report.sweep_figures import BEST
from orchestrator.report.sweep_stats import Sweep, TrialRun


def lineage_chart(sweep: Sweep) -> Chart | None:
    """Population-based training: who went on from whose checkpoint, and the line that led to the best."""
    import plotly.graph_objects as go

    if not any(t.state.parent for t in sweep.trials):
        return None
    rows = {t.id: _member(sweep, t) for t in sweep.trials}
    by_id = {t.id: t for t in sweep.trials}
    winning = _ancestors(by_id, sweep.best)
    traces = []
    for name, color, width, chosen in (
        ("went on", "#94a3b8", 2.0, [t for t in sweep.trials if not _took_over(rows, t)]),
        ("took over another's checkpoint", "#dc2626", 2.0, [t for t in sweep.trials if _took_over(rows, t)]),
        ("led to the best", BEST, 4.0, [t for t in sweep.trials if t.id in winning]),
    ):  # fmt: skip
        x: list[float | None] = []
        y: list[float | None] = []
        for trial in chosen:
            from_row = rows.get(trial.state.parent[0]) if trial.state.parent else rows[trial.id]
            start, end = float(trial.first_step), float(max(trial.last_step, trial.first_step))
            turn = start + 0.25 * (end - start)
            x += [start, turn, end, None]
            y += [from_row, rows[trial.id], rows[trial.id], None]
        if x:
            line = {"color": color, "width": width}
            traces.append(
                go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hoverinfo="skip")
            )
    ends = [t for t in sweep.trials if t.state.best is not None]
    values = [sweep.log.value(t.state, t.state.step) for t in ends]
    traces.append(
        go.Scatter(
            x=[float(t.last_step) for t in ends], y=[rows[t.id] for t in ends], mode="markers",
            marker={
                "size": 9, "color": [finite(v) for v in values], "colorscale": "Viridis",
                "reversescale": not sweep.log.metric.maximize, "showscale": True, "colorbar": {"thickness": 10},
            },
            text=[trial_words(sweep, t) for t in ends], hovertemplate="%{text}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    members = max(rows.values()) + 1
    note = "A line is a member of the population. Dots: the metric at the end of a generation."
    chart = built(
        "lineage",
        "Lineage",
        note,
        traces,
        "member",
        wide=True,
        height_px=max(260, 130 + 18 * members),
    )
    chart.figure["layout"]["yaxis"].update(autorange="reversed", dtick=max(1, members // 20))
    chart.figure["layout"]["hovermode"] = "closest"
    return chart


def _member(sweep: Sweep, trial: TrialRun) -> int:
    return trial.state.index % max(int(finite(sweep.plan.get("num_trials")) or 1), 1)


def _took_over(rows: Mapping[str, int], trial: TrialRun) -> bool:
    parent = trial.state.parent
    return parent is not None and rows.get(parent[0]) != rows[trial.id]


def _ancestors(by_id: Mapping[str, TrialRun], trial: TrialRun | None) -> set[str]:
    found: set[str] = set()
    while trial is not None and trial.id not in found:
        found.add(trial.id)
        trial = by_id.get(trial.state.parent[0]) if trial.state.parent else None
    return found
