"""Predictions of a loaded model for rows of any quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.model.tokenizer import unembedded
from orchestrator.plan.plan import Plan


def predictions(
    plan: Plan, model: Any, tokenizer: Any, inputs: Sequence[str | dict[str, Any]], batch_rows: int
) -> list[dict[str, Any]]:
    """Return one prediction per input, in order.

    A row that holds nothing to predict from is answered with its columns and `why`. Raises DataError for an
    input without the columns.
    """
    task = plan.spec.task
    rows = [task.row_of(one) for one in inputs]
    whys = [task.prediction_problem(row) or _beyond(plan, model, tokenizer, row) for row in rows]
    good = [row for row, why in zip(rows, whys, strict=True) if why is None]
    found: list[dict[str, Any]] = []
    for start in range(0, len(good), batch_rows):
        chunk = good[start : start + batch_rows]
        found += task.predict(model, tokenizer, chunk, plan.max_length_tokens)
    left = iter(found)
    return [
        next(left) if why is None else {**_columns(task.predict_columns, row), "why": why}
        for row, why in zip(rows, whys, strict=True)
    ]


def _columns(names: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _beyond(plan: Plan, model: Any, tokenizer: Any, row: dict[str, Any]) -> str | None:
    """Why a model without rows for all of its tokenizer's tokens cannot read this row."""
    if tokenizer is None:
        return None
    given = [row[column] for column in plan.spec.task.predict_columns]
    texts = [text for one in given for text in ([one] if isinstance(one, str) else one)]
    if not all(isinstance(text, str) for text in texts):
        return None
    token = unembedded(model.config, tokenizer, texts)
    return None if token is None else f"holds the token {token!r}, which the model does not embed"
