"""A small chart made of text."""

from __future__ import annotations

from collections.abc import Callable

BLOCKS = " ▁▂▃▄▅▆▇█"


def text_chart(
    value: Callable[[int], float], count: int, top: str, width: int = 60, height: int = 5
) -> list[str]:
    """Lines that draw `value(0…count − 1)`, each from 0 to 1. `top` is written at the height of 1."""
    columns = min(width, count)
    at = [round(i * (count - 1) / max(columns - 1, 1)) for i in range(columns)]
    eighths = [round(max(0.0, min(1.0, value(i))) * 8 * height) for i in at]
    margin = max(len(top), 1)
    lines = []
    for row in range(height - 1, -1, -1):
        bars = "".join(BLOCKS[max(0, min(8, e - 8 * row))] for e in eighths)
        label = top if row == height - 1 else ""
        lines.append(f"{label:>{margin}} ┤{bars}")
    first, last = "1", f"{count:,}"
    lines.append(f"{'0':>{margin}} └{'─' * columns}")
    lines.append(f"{'':>{margin}}  {first}{last:>{max(columns - len(first), len(last) + 1)}}")
    return lines
