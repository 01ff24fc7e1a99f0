"""Log a running trial: steps, evaluations, events. Rank 0 writes."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.report.records import RecordWriter, append_event
from orchestrator.run_folder import RunFolder


class MetricsLogger:
    """Steps are collected and written beside training; the other ranks' calls do nothing."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self._events = folder.events
        self._writes = rank == 0
        self._steps = RecordWriter(folder.steps) if self._writes else None
        self._evals = RecordWriter(folder.evals) if self._writes else None
        self._stepped = False

    def event(self, kind: str, **facts: Any) -> None:
        """Something happened; on disk at once."""
        if self._writes:
            append_event(self._events, kind, **facts)

    def step(self, step: int, **figures: Any) -> None:
        """An optimizer step was done; the first one of a start is on disk at once."""
        if self._steps is None:
            return
        self._steps.write(step=step, time=time.time(), **figures)
        if not self._stepped:
            self._stepped = True
            self._steps.flush()
            self.event("first_step", step=step)

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation was done; on disk at once."""
        if self._evals is not None:
            self._evals.write(time=time.time(), **record)
            self._evals.flush()

    def flush(self) -> None:
        """Have all steps on disk."""
        if self._steps is not None:
            self._steps.flush()
