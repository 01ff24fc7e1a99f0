"""Numbers, sizes and times as the report writes them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from orchestrator.report.records import finite


def metric_text(value: float) -> str:
    """Four decimals, or four digits where that is more."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.4g}"


def number(value: Any) -> str:
    """A number with thousands separated; anything else as it is, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or finite(value) is None:
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.4g}"


def bytes_text(value: Any) -> str:
    """Bytes in the binary unit that suits them."""
    size = finite(value)
    if size is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def duration(seconds: Any) -> str:
    """Seconds as people say them: 42 ms, 3.1 s, 12 min 3 s, 2 h 5 min."""
    known = finite(seconds)
    if known is None:
        return "–"
    if 0 < abs(known) < 1:
        return f"{1000 * known:.0f} ms"
    if abs(known) < 60:
        return f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """Seconds since the epoch → `2026-11-22 00:46:01` in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def shown(value: Any) -> str:
    """A value of a job's field, short; nothing for one that is not set."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def pretty(value: Any) -> str:
    """JSON for reading. (jinja's own filter would mark it as safe.)"""
    return json.dumps(value, indent=2)
