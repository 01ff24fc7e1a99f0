"""When evaluations say that training is over. Pure: the same on all ranks, and after a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.metric import Metric
from orchestrator.report.overfitting import evals_overfitting
from orchestrator.spec.job import StopSpec


def reason_to_stop(
    stop: StopSpec,
    history: Sequence[Mapping[str, Any]],
    metric: Metric,
    first_loss: float = math.inf,
) -> str:
    """Why training ends after the evaluations in `history`, in words; empty where it goes on.

    `first_loss`: the training loss of the first step, before anything was learned.
    """
    if not history:
        return ""
    values = [float(record[metric.name]) for record in history]
    if stop.target is not None and metric.score(values[-1]) >= metric.score(stop.target):
        return f"{metric.name} {values[-1]:.4f} reached stop.target = {stop.target:g}"
    waited = _without_gain(values, stop.min_delta, metric)
    if stop.patience is not None and waited >= stop.patience:
        return (
            f"{metric.name} got no better in {waited} evaluations, stop.patience = {stop.patience}"
        )
    bad = evals_overfitting(history)
    if stop.overfitting_evals is not None and bad >= stop.overfitting_evals:
        return (
            f"over-fitting: in {bad} evaluations in a row the evaluation loss rose while the training loss "
            f"fell, stop.overfitting_evals = {stop.overfitting_evals}"
        )
    losses = (first_loss, *(float(record["train_loss"]) for record in history))
    return _blown_up(losses, stop.max_loss_ratio)


def _blown_up(losses: Sequence[float], ratio: float | None) -> str:
    """What to say of a training loss far above its lowest; empty where it is not."""
    if ratio is None or losses[-1] <= ratio * min(losses[:-1]):
        return ""
    return (
        f"diverging: the training loss rose from {min(losses[:-1]):.4g} to {losses[-1]:.4g}, "
        f"stop.max_loss_ratio = {ratio:g}"
    )


def _without_gain(values: Sequence[float], min_delta: float, metric: Metric) -> int:
    """Evaluations since the last that beat the best before it by more than `min_delta`."""
    best, waited = -math.inf, 0
    for score in map(metric.score, values):
        waited += 1
        if score > best + min_delta:
            best, waited = score, 0
    return waited
