"""Metrics: a direction each, and no value that is not finite ever wins."""

from __future__ import annotations

import math

import pytest

from orchestrator.metric import LOWER_IS_BETTER, Metric


@pytest.mark.parametrize(
    ("name", "maximize"),
    [
        ("accuracy", True),
        ("f1", True),
        ("reward_accuracy", True),
        *((n, False) for n in LOWER_IS_BETTER),
    ],
)
def test_a_name_implies_the_direction(name: str, maximize: bool) -> None:
    metric = Metric.named(name)
    assert metric.maximize is maximize
    assert metric.direction == ("maximize" if maximize else "minimize")
    assert metric.mode == ("max" if maximize else "min")


@pytest.mark.parametrize("maximize", [True, False])
def test_the_better_value_has_the_higher_score(maximize: bool) -> None:
    metric = Metric("any", maximize)
    better, worse = (2.0, 1.0) if maximize else (1.0, 2.0)
    assert metric.score(better) > metric.score(worse)
    assert metric.is_better(better, worse)
    assert not metric.is_better(worse, better)
    assert not metric.is_better(better, better), "an equal value replaces nothing"
    assert metric.is_better(worse, None), "any finite value beats none"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("maximize", [True, False])
def test_a_value_that_is_not_finite_never_wins(maximize: bool, value: float) -> None:
    metric = Metric("any", maximize)
    assert metric.score(value) == -math.inf
    assert not metric.is_better(value, None)
    assert not metric.is_better(value, 1.0)
    assert metric.is_better(1.0, value)
