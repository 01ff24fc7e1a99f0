"""Append-only JSON lines: one record per step, evaluation or event, cheap to write, safe to tail."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.redaction import redact

FLUSH_S = 0.5
"""Longest time a record waits in memory."""


class RecordWriter:
    """Appends records to one file; buffered, so that a training step pays microseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._flushed_at = time.monotonic()

    def write(self, **record: Any) -> None:
        """Append one record."""
        self._waiting.append(json.dumps(record))
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Make everything written so far visible to readers."""
        _append(self._path, self._waiting)
        self._waiting = []
        self._flushed_at = time.monotonic()


def append_event(path: Path, kind: str, **facts: Any) -> None:
    """Append one event with the time of day. Texts of libraries may quote credentials, which are removed."""
    _append(path, [redact(json.dumps({"time": time.time(), "kind": kind, **facts}))])


def _append(path: Path, lines: list[str]) -> None:
    """Add lines; one that a killed writer left torn is ended first, so that it harms no other.

    On a full disk the lines are lost and nothing is raised: a figure is not worth a run, and the
    next checkpoint says what is wrong.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as handle:
            if handle.tell():
                handle.seek(-1, 2)
                if handle.read(1) != b"\n":
                    handle.write(b"\n")
            handle.write("".join(f"{line}\n" for line in lines).encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all complete records; torn lines, left by killed writers, and damaged ones are left out."""
    if not path.exists():
        return []
    return list(_parse(path.read_text(encoding="utf-8", errors="replace").split("\n")))


def _parse(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return records by step, ascending. A step replayed after a restart counts once, the last time.

    Records without a step are left out.
    """
    records = [r for r in read_records(path) if type(r.get("step")) is int]
    latest = {record["step"]: record for record in records}
    return [latest[step] for step in sorted(latest)]


class Tail:
    """Reads the records that were appended since the last call."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._rest = ""

    def read(self) -> list[dict[str, Any]]:
        """New complete records; none where nothing was written."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as handle:
                handle.seek(self._offset)
                text = handle.read()
                self._offset = handle.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = (self._rest + text).split("\n")
        return list(_parse(lines))


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
