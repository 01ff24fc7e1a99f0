"""A table of runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder, list_runs, read_json


def runs_table(storage: Path) -> Table:
    """One line per run below `storage`, oldest first."""
    table = Table(title=f"runs in {storage}", title_justify="left")
    for name in ("run", "task", "status", "step", "best", "started"):
        table.add_column(name, justify="right" if name == "step" else "left")
    for folder in list_runs(storage):
        table.add_row(*_row(folder))
    return table


def _row(folder: RunFolder) -> tuple[str, ...]:
    plan: dict[str, Any] = read_json(folder.plan)
    outcome: dict[str, Any] = read_json(folder.outcome) or {}
    steps = read_steps(folder.steps)
    step = outcome.get("step") or (steps[-1]["step"] if steps else 0)
    status = outcome.get("status") or ("unfinished" if steps else "not started")
    task = plan["spec"]["task"]["type"]
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.spec.stat().st_mtime))
    return folder.name, task, status, f"{step}/{plan['total_steps']}", _best(outcome), started


def _best(outcome: dict[str, Any]) -> str:
    best = outcome.get("best") or {}
    figures = {k: v for k, v in best.items() if isinstance(v, float) and k not in ("eval_s",)}
    return "  ".join(f"{k} {v:.4f}" for k, v in list(figures.items())[:2])
