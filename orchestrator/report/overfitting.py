"""Over-fitting: the training loss still falls while the evaluation loss rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from orchestrator.report.records import finite

LEVEL = 0.01
"""A rise of less than this share of the lowest evaluation loss is not called over-fitting."""


def evals_overfitting(history: Sequence[Mapping[str, Any]]) -> int:
    """Return how many evaluations in a row, up to the last, had a higher `loss` and a lower `train_loss` than
    the one before; 0 where the last had not.

    `train_loss` is the mean over the steps since the evaluation before.
    """
    count = 0
    for before, after in pairwise(history):
        rose = _change(before, after, "loss")
        fell = _change(before, after, "train_loss")
        count = count + 1 if rose is not None and fell is not None and rose > 0 > fell else 0
    return count


def _change(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float | None:
    first, second = finite(before.get(name)), finite(after.get(name))
    return None if first is None or second is None else second - first


def overfitting_words(history: Sequence[Mapping[str, Any]]) -> str:
    """Describe over-fitting in a sentence, from the evaluations; empty for fewer than two of them."""
    known = [r for r in history if None not in (finite(r.get("loss")), finite(r.get("train_loss")))]
    if len(known) < 2:
        return ""
    best, last = min(known, key=lambda r: r["loss"]), known[-1]
    gap = f"the gap between evaluation and training loss went from {_gap(known[0])} to {_gap(last)}"
    if best is last:
        return f"No over-fitting seen: the evaluation loss is lowest at the last evaluation; {gap}."
    if last["loss"] - best["loss"] < LEVEL * abs(best["loss"]):
        return f"No over-fitting seen: the evaluation loss has been level since step {best['step']}; {gap}."
    if last["train_loss"] < best["train_loss"]:
        return (
            f"Over-fitting since step {best['step']}: the evaluation loss rose from {best['loss']:.4f} to "
            f"{last['loss']:.4f} while the training loss fell from {best['train_loss']:.4f} to "
            f"{last['train_loss']:.4f}; {gap}. More regularization, fewer epochs or a lower rate may help; "
            "stop.overfitting_evals ends such a run."
        )
    return (
        f"The evaluation loss was lowest at step {best['step']}, and the training loss too; {gap}."
    )


def _gap(record: Mapping[str, Any]) -> str:
    return f"{record['loss'] - record['train_loss']:+.4f}".replace("-", "−")
