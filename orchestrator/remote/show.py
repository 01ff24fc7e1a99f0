"""Show jobs on a cluster as tables and as plain values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.report.terminal import cells

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails


def job_info(info: JobDetails) -> dict[str, Any]:
    """Return a job's id, run, status, exit code and times in seconds, without its environment."""
    start_s, end_s = _seconds(info.start_time), _seconds(info.end_time)
    return {
        "id": info.submission_id,
        "run": (info.metadata or {}).get("run"),
        "status": info.status.value,
        "exit_code": info.driver_exit_code,
        "started_at_s": start_s,
        "duration_s": None if start_s is None else round((end_s or time.time()) - start_s, 1),
        "entrypoint": info.entrypoint,
        "message": info.message,
    }


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def job_table(info: JobDetails) -> Table:
    """Return a table of one job, with a field per row."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in job_info(info).items():
        if name == "started_at_s" and value is not None:
            name, value = "started", _clock(value)
        if value is not None:
            table.add_row(*cells(name, _first_lines(str(value))))
    return table


def jobs_table(jobs: Sequence[JobDetails]) -> Table:
    """Return a table of all jobs, with a job per row."""
    table = Table(box=None, pad_edge=False)
    for column in ("id", "run", "status", "exit code", "started", "seconds"):
        table.add_column(column)
    for values in map(job_info, jobs):
        started = _clock(values["started_at_s"]) if values["started_at_s"] else ""
        row = (values["id"], values["run"], values["status"], values["exit_code"], started)
        table.add_row(*cells(*("" if v is None else v for v in (*row, values["duration_s"]))))
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _first_lines(text: str, count: int = 12) -> str:
    lines = text.splitlines()
    return "\n".join(lines[:count] + (["…"] if len(lines) > count else []))
