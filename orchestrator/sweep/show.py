"""A sweep's plan on the screen: each number with its reason."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.plan.show import Row, show_plan, table
from orchestrator.report.records import read_records, read_steps
from orchestrator.report.terminal import styled
from orchestrator.report.text import duration
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import SweepFolder
from orchestrator.spec.sweep import Choice, DimensionSpec
from orchestrator.sweep.plan import SweepPlan

REBUILD_S = 6.3
"""Until new workers have started and imported what they need; benchmarks/recovery.py, the first two phases."""


def show_sweep(plan: SweepPlan, folder: SweepFolder) -> RenderableType:
    """Slots, rungs and compute of a sweep, then the plan of one trial.

    `folder`: where it runs; once a trial was measured there, the time that is left is shown too.
    """
    parts: list[RenderableType] = [
        styled(f"{plan.spec.name}: a sweep of {plan.num_trials} trials", "bold"),
        styled(plan.cluster),
        table("search", _search(plan)),
        table("slots and compute", _compute(plan, folder)),
        _rungs(plan),
    ]
    parts += [styled(f"warning: {text}", "yellow") for text in plan.warnings]
    return Group(*parts, Text(), Text("one trial, with the job's own values"), show_plan(plan.base))


def _search(plan: SweepPlan) -> Iterator[Row]:
    sweep = plan.sweep
    for path, dimension in sweep.dimensions().items():
        when = " and ".join(f"{k} = {v}" for k, v in dimension.when.items())
        yield path, _range(dimension), f"where {when}" if when else ""
    for text in sweep.constraints:
        yield "constraint", text, ""
    yield "searcher", sweep.searcher.type, f"seed {sweep.seed}"
    yield "scheduler", sweep.scheduler.type, plan.reasons.get("rungs", "")


def _range(dimension: DimensionSpec) -> str:
    if isinstance(dimension, Choice):
        return " | ".join(str(value) for value in dimension.values)
    return f"{dimension.low:g} … {dimension.high:g} ({dimension.type})"


def _compute(plan: SweepPlan, folder: SweepFolder) -> Iterator[Row]:
    base = plan.base
    device = f"{base.gpus_per_worker:g} GPU" if base.on_gpu else f"{base.cpus_per_worker} CPUs"
    yield "slots", str(plan.slots), plan.reasons.get("slots", "sweep.max_concurrent_trials")
    flight = f"{plan.slots + 1}", "one more than slots, planned and waiting"
    yield "trials in flight", *flight
    yield "workers per trial", f"{base.num_workers} × {device}", base.reasons.get("num_workers", "")
    full = plan.num_trials * base.total_steps
    saved = f"; all trials to their end would take {full:,}" if plan.expected_steps < full else ""
    yield "expected steps", f"{plan.expected_steps:,}", f"of all trials together{saved}"
    rows = plan.expected_steps * base.global_batch_size
    yield (
        "expected rows",
        f"{rows:,}",
        f"{base.total_steps * base.global_batch_size:,} in one whole trial",
    )
    yield from _slot_changes(plan)
    step_s = measured_step_s(folder)
    if step_s is not None:
        done = open_log(folder).steps_total
        left_s = max(plan.expected_steps - done, 0) * step_s / plan.slots
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left_s))
        yield "expected time left", duration(left_s), f"{step_s:.2f} s a step, as measured so far"
        yield "expected end", end, "if it runs from now on"


def _slot_changes(plan: SweepPlan) -> Iterator[Row]:
    if "resources.num_workers" in plan.sweep.space:
        yield (
            "worker counts differ",
            f"up to {plan.num_trials - 1} times a slot is rebuilt",
            f"new processes and imports: {REBUILD_S:g} s each time where it was measured (2 cores)",
        )


def measured_step_s(folder: SweepFolder) -> float | None:
    """Seconds per optimizer step, evaluations included, over the trials that ran; None before the first."""
    seconds, steps = 0.0, 0
    for record in read_records(folder.slots):
        done = read_steps(folder.trial(record["trial"]).steps)
        seconds += record["ended"] - record["began"]
        steps += len(done)
    return seconds / steps if steps else None


def _rungs(plan: SweepPlan) -> Table:
    shown = Table(
        title="rungs", title_justify="left", title_style="bold cyan", box=None, pad_edge=False
    )
    for name in ("step", "rows of a trial", "trials expected"):
        shown.add_column(name, justify="right")
    for step, trials in zip(plan.rungs, plan.expected, strict=True):
        shown.add_row(f"{step:,}", f"{step * plan.base.global_batch_size:,}", f"{trials:g}")
    return shown
