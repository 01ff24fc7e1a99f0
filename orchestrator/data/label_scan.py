"""The label set of a job that lists none: names from files' metadata, else the labels that rows hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.data.readers import class_names
from orchestrator.data.sources import SourceFile
from orchestrator.data.write import EXAMPLES, PieceWork, Place, bad_records, reason_kind
from orchestrator.errors import DataError
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow
from orchestrator.tasks.labels import (
    label_warnings,
    look_like_measurements,
    printable,
    shown,
    sorted_labels,
)

MAX_LABELS = 1000
"""Most labels that a job need not list."""
MAX_COUNTED = 2000
"""Labels are counted up to here."""
Run = Callable[[Sequence[PieceWork], Any], list[dict[str, Any]]]


def names_of_classes(spec: JobSpec, files: Sequence[SourceFile]) -> dict[str, tuple[str, ...]]:
    """Return column → class names by files' metadata, where all files agree and the job gives no other names."""
    if not spec.task.label_feature:
        return {}
    found = [class_names(file, spec.task.columns) for file in files]
    if not found or not found[0] or any(one != found[0] for one in found):
        return {}
    given = getattr(spec.task, "labels", None)
    return {
        column: names
        for column, names in found[0].items()
        if given is None or set(names) <= set(given)
    }


def scan_labels(work: PieceWork) -> dict[str, Any]:
    """Return the distinct labels of some pieces, and why rows have none."""
    column = work.spec.task.label_source
    assert column is not None
    labels: set[str] = set()
    rows, reasons = 0, Counter[str]()
    bad: list[tuple[Place, str]] = []
    for piece, item in work.rows():
        rows += 1
        found: Any = item.row
        if isinstance(found, dict):
            found = work.spec.task.labels_in(found.get(column))
        if isinstance(found, BadRow):
            reasons[reason_kind(printable(found.why))] += 1
            if len(bad) < EXAMPLES:
                bad.append(((piece, item.number), printable(found.why)))
        elif len(labels) <= MAX_COUNTED:
            labels.update(found)
    return {
        "labels": sorted(labels)[: MAX_COUNTED + 1],
        "rows": rows,
        "reasons": reasons,
        "bad": bad_records(bad),
    }


def label_set(
    spec: JobSpec, work: Sequence[PieceWork], run: Run
) -> tuple[tuple[str, ...], list[str]]:
    """Return (labels, warnings on them) of the rows that `work` reads.

    Raises DataError where there are fewer than two or too many, with the reasons of rows without one.
    """
    column = spec.task.label_source
    assert column is not None
    if names := work[0].names.get(column):
        return names, label_warnings(names)
    found = run(work, scan_labels)
    labels = sorted_labels(label for one in found for label in one["labels"])
    rows = sum(one["rows"] for one in found)
    if len(labels) < 2:
        raise DataError(_too_few(column, labels, rows, found))
    if len(labels) > MAX_LABELS or look_like_measurements(labels):
        raise DataError(_too_many(column, labels, rows))
    return labels, label_warnings(labels) if spec.task.labeled_head else []


def _too_few(column: str, labels: Sequence[str], rows: int, found: Sequence[dict[str, Any]]) -> str:
    reasons = sum((Counter(one["reasons"]) for one in found), Counter[str]())
    bad = [record for one in found for record in one["bad"]]
    if not rows:
        return f"column {column!r}: the input holds no rows."
    held = f"one label, {shown(labels[0])}" if labels else "no usable label"
    lines = [f"column {column!r} holds {held} in {rows:,} rows; two or more are needed."]
    if reasons:
        lines += reason_lines(reasons, bad)
    elif labels:
        lines.append("Name another column under `task:`, or list all labels under task.labels.")
    return "\n".join(lines)


def reason_lines(reasons: Counter[str], examples: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines on rows that cannot be used: how often each reason occurs, and examples."""
    out = [f"{sum(reasons.values()):,} rows cannot be used:"]
    out += [f"  {count:,} rows: {why}" for why, count in reasons.most_common(5)]
    out += [f"  {r['file']}, row {r['row']}: {r['why']}" for r in examples[:5]]
    return out


def _too_many(column: str, labels: Sequence[str], rows: int) -> str:
    count = f"more than {MAX_COUNTED:,}" if len(labels) > MAX_COUNTED else f"{len(labels):,}"
    examples = ", ".join(shown(label) for label in labels[:5])
    text = f"column {column!r} holds {count} distinct labels in {rows:,} rows: {examples}, … "
    if look_like_measurements(labels):
        return (
            f"{text}They look like numbers to be predicted: set task.type=text_regression and "
            f"task.value_column={column}, or list them under task.labels."
        )
    return f"{text}If it is the right column, list them under task.labels."
