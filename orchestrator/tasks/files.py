"""Files that a column names or holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from orchestrator.tasks.base import BadRow

URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
"""The beginning of a URL. A path that begins so can be written `./name:…`."""


def file_of(value: Any, column: str, numbers: str) -> Path | bytes | BadRow:
    """Return a file's path or its content, or why a value is neither.

    Args:
        value: a path, bytes, or `{bytes, path}`.
        column: names the value in messages.
        numbers: what an array of numbers would be, and what to do with it.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
        if value is None:
            return BadRow(f"column {column!r} holds neither bytes nor a path")
    if isinstance(value, bytes | bytearray | memoryview) and value:
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        kind = type(value).__name__ if value is not None else "null"
        if isinstance(value, str | bytes):
            kind = "nothing"
        elif isinstance(value, list | tuple) or hasattr(value, "shape"):
            kind += f" ({numbers})"
        return BadRow(f"column {column!r} must be a path or bytes of a file, got {kind}")
    if URL.match(value) and not Path(value).exists():
        return BadRow(f"column {column!r}: {value[:80]!r} is a URL: download it and name the file")
    return Path(value).expanduser()


def missing_file(path: Path) -> str:
    """Say that a file is not there."""
    return f"no file {str(path)!r} (relative paths start at the working directory)"
