"""Detect repeated failures: a run ends when two worker groups fail with one signature."""

from __future__ import annotations

import traceback
from typing import Any

from orchestrator.report.records import append_event, read_records, read_steps
from orchestrator.run_folder import RunFolder

WORDS = 2000
"""Characters of a traceback that are kept, from its end."""
MAY_PASS = ("gloo", "nccl", "cuda", "connection", "peer", "socket", "timed out")
"""What a RuntimeError says of another rank's end or of a device, and of no mistake in the job."""


def failure_text() -> str:
    """The end of the traceback of the error that is being handled."""
    return traceback.format_exc()[-WORDS:]


def failure_signature(error: Exception, folder: RunFolder) -> str | None:
    """Step, kind and line of an error; None for what a disk, a network or a lost peer raises, which may pass."""
    import ray
    import torch

    passing = isinstance(error, (OSError, ray.exceptions.RayError))
    if isinstance(error, RuntimeError):
        passing = passing or any(word in str(error).lower() for word in MAY_PASS)
    if passing and not isinstance(error, torch.OutOfMemoryError):
        return None
    steps = read_steps(folder.steps)
    last = traceback.extract_tb(error.__traceback__)[-1]
    step = steps[-1]["step"] if steps else 0
    return f"step {step}: {type(error).__name__} in {last.filename}:{last.lineno}"


def record_failure(error: Exception, folder: RunFolder) -> None:
    """Leave in the run folder what this worker dies of, for those who are started in its place."""
    place = failure_signature(error, folder)
    if place is not None:
        group = sum(e["kind"] == "imports" for e in _of_this_launch(folder))
        append_event(folder.events, "crash", place=place, group=group, words=failure_text())


def repeated_failure(folder: RunFolder) -> str | None:
    """Return the failure that two worker groups of this launch had at the same place, None if there is none."""
    crashes = [e for e in _of_this_launch(folder) if e["kind"] == "crash"]
    for crash in crashes:
        groups = {e["group"] for e in crashes if e["place"] == crash["place"]}
        if len(groups) > 1:
            return (
                f"the same error ended two worker groups, so it would end the next one: {crash['place']}\n"
                f"{crash['words']}"
            )
    return None


def _of_this_launch(folder: RunFolder) -> list[dict[str, Any]]:
    events = read_records(folder.events)
    starts = [at for at, event in enumerate(events) if event["kind"] == "launch"]
    return events[starts[-1] :] if starts else events
