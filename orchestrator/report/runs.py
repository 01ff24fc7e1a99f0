"""A table of runs and sweeps, and the report on either."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.report.html import write_report
from orchestrator.report.records import read_steps
from orchestrator.report.sweep_html import write_sweep_report
from orchestrator.report.terminal import cells, styled
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import (
    RunFolder,
    SweepFolder,
    in_use,
    list_runs,
    list_sweeps,
    read_json,
)


def write_report_on(folder: RunFolder | SweepFolder) -> Path:
    """(Re)write the report of a run or a sweep; returns its path."""
    return write_sweep_report(folder) if isinstance(folder, SweepFolder) else write_report(folder)


def runs_table(storage_path: Path) -> Table:
    """One line per run or sweep below `storage_path`, oldest first."""
    table = Table(title=styled(f"runs in {storage_path}"), title_justify="left")
    for name in ("run", "task", "status", "step", "best", "started"):
        table.add_column(name, justify="right" if name == "step" else "left")
    found: list[RunFolder | SweepFolder] = [*list_runs(storage_path), *list_sweeps(storage_path)]
    for folder in sorted(found, key=lambda f: f.root.stat().st_mtime):
        try:
            row = _row(folder) if isinstance(folder, RunFolder) else _sweep_row(folder)
            table.add_row(*cells(*row))
        except (AttributeError, KeyError, OSError, TypeError, ValueError):  # a torn or edited file
            table.add_row(*cells(folder.name, "", "unreadable"))
    return table


def _row(folder: RunFolder) -> tuple[str, ...]:
    plan: dict[str, Any] = read_json(folder.plan)
    outcome: dict[str, Any] = read_json(folder.outcome) or {}
    steps = read_steps(folder.steps)
    step = outcome.get("step") or (steps[-1]["step"] if steps else 0)
    status = str(outcome.get("status") or _without_end(folder, bool(steps)))
    task = str(plan["spec"]["task"]["type"])
    return (
        folder.name, task, status, f"{step}/{plan['total_steps']}", _best(outcome), _began(folder.spec)
    )  # fmt: skip


def _sweep_row(folder: SweepFolder) -> tuple[str, ...]:
    plan: dict[str, Any] = read_json(folder.plan)
    outcome: dict[str, Any] = read_json(folder.outcome) or {}
    log = open_log(folder)
    best = log.best()
    shown = "" if best is None else f"{log.metric.name} {best.best:.4f}  ({best.id})"
    status = str(outcome.get("status") or _without_end(folder, bool(log.trials)))
    task = f"{plan['spec']['task']['type']}, sweep"
    return folder.name, task, status, f"{len(log.trials)} trials", shown, _began(folder.spec)


def _without_end(folder: RunFolder | SweepFolder, begun: bool) -> str:
    if in_use(folder.root):
        return "running"
    return "unfinished" if begun else "not started"


def _began(spec: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(spec.stat().st_mtime))


def _best(outcome: dict[str, Any]) -> str:
    best = outcome.get("best") or {}
    figures = {k: v for k, v in best.items() if isinstance(v, float) and k not in ("eval_s",)}
    return "  ".join(f"{k} {v:.4f}" for k, v in list(figures.items())[:2])
