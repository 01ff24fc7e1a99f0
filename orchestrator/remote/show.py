"""Jobs on a cluster for people to look at, and as plain figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.report.terminal import cells

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails


def job_facts(info: JobDetails) -> dict[str, Any]:
    """A job without its environment: id, run, status, exit code, times in seconds."""
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
    """One job, a field a row."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in job_facts(info).items():
        if name == "started_at_s" and value is not None:
            name, value = "started", _clock(value)
        if value is not None:
            table.add_row(*cells(name, _first_lines(str(value))))
    return table


def jobs_table(found: Sequence[JobDetails]) -> Table:
    """All jobs, a job a row."""
    table = Table(box=None, pad_edge=False)
    for column in ("id", "run", "status", "exit code", "started", "seconds"):
        table.add_column(column)
    for facts in map(job_facts, found):
        started = _clock(facts["started_at_s"]) if facts["started_at_s"] else ""
        row = (facts["id"], facts["run"], facts["status"], facts["exit_code"], started)
        table.add_row(*cells(*("" if v is None else v for v in (*row, facts["duration_s"]))))
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _first_lines(text: str, count: int = 12) -> str:
    lines = text.splitlines()
    return "\n".join(lines[:count] + (["…"] if len(lines) > count else []))
