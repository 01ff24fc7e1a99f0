"""What ends a run early, and what the report says about over-fitting."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_spec import refused

from orchestrator.metric import Metric
from orchestrator.report.figures import gap_chart, rate_chart
from orchestrator.report.overfitting import evals_overfitting, overfitting_words
from orchestrator.spec.job import StopSpec
from orchestrator.train.stopping import reason_to_stop

BASE: dict[str, Any] = {
    "name": "job",
    "task": {"type": "causal_lm"},
    "model": {"pretrained": "org/model"},
    "data": {"train": "memory://", "eval_fraction": 0.1},
}


def evals(*losses: tuple[float, float]) -> list[dict[str, Any]]:
    """Evaluations with these (evaluation, training) losses."""
    return [
        {"step": 10 * (i + 1), "loss": loss, "train_loss": train}
        for i, (loss, train) in enumerate(losses)
    ]


def stopped_after(stop: StopSpec, history: list[dict[str, Any]], higher: bool = False) -> int:
    """How many evaluations were made before the run ended; all of them where it did not."""
    for n in range(len(history) + 1):
        if reason_to_stop(stop, history[:n], Metric("loss", higher)):
            return n
    return len(history)


def test_a_target_ends_the_run_when_it_is_reached_from_either_side() -> None:
    falling = evals((0.9, 1), (0.5, 1), (0.4, 1))
    assert stopped_after(StopSpec(target=0.5), falling) == 2
    assert stopped_after(StopSpec(target=0.5), falling, higher=True) == 1
    assert "stop.target = 0.5" in reason_to_stop(
        StopSpec(target=0.5), falling[:2], Metric("loss", False)
    )


def test_patience_counts_evaluations_without_a_better_value() -> None:
    history = evals((0.9, 1), (0.8, 1), (0.79, 1), (math.nan, 1), (0.81, 1), (0.1, 1))
    assert stopped_after(StopSpec(patience=2), history) == 5
    assert stopped_after(StopSpec(patience=2, min_delta=0.05), history) == 4
    assert stopped_after(StopSpec(patience=3), history) == 6, "it went on and got better"
    endless = evals((math.inf, 1), (0.5, 1), (0.6, 1))
    assert stopped_after(StopSpec(patience=2), endless, higher=True) == 3, (
        "infinity is no best value"
    )
    assert not reason_to_stop(StopSpec(patience=2), endless, Metric("loss", True))


def test_over_fitting_is_a_rising_evaluation_loss_while_the_training_loss_falls() -> None:
    apart = evals((0.9, 1.0), (0.6, 0.7), (0.65, 0.5), (0.7, 0.4))
    assert [evals_overfitting(apart[:n]) for n in range(5)] == [0, 0, 0, 1, 2]
    assert stopped_after(StopSpec(overfitting_evals=2), apart) == 4
    both_rise = evals((0.6, 0.7), (0.65, 0.8), (0.7, 0.9))
    assert evals_overfitting(both_rise) == 0, "that is divergence, not over-fitting"


def test_a_loss_that_blows_up_but_stays_finite_ends_a_run_that_asks_for_it() -> None:
    blown = evals((0.9, 1.0), (0.6, 0.5), (0.8, 0.9), (9.0, 8.0))
    assert stopped_after(StopSpec(max_loss_ratio=3.0), blown) == 4
    assert "from 0.5 to 8" in reason_to_stop(
        StopSpec(max_loss_ratio=3.0), blown, Metric("loss", False)
    )
    assert stopped_after(StopSpec(max_loss_ratio=1.5), blown) == 3
    at_once = evals((9.0, 400.0), (8.0, 300.0))
    said = reason_to_stop(
        StopSpec(max_loss_ratio=3.0), at_once[:1], Metric("loss", False), first_loss=0.7
    )
    assert "from 0.7 to 400" in said, "before there was anything to compare with but the first step"
    assert not reason_to_stop(StopSpec(), blown, Metric("loss", False))


def test_a_training_loss_of_zero_counts_and_a_rise_within_a_hundredth_does_not() -> None:
    words = overfitting_words(evals((0.5, 0.2), (0.4, 0.1), (0.6, 0.0)))
    assert "Over-fitting since step 20" in words
    assert "to 0.0000" in words
    level = overfitting_words(evals((0.5, 0.2), (0.4000, 0.1), (0.4001, 0.05)))
    assert "level since step 20" in level
    assert "Over-fitting since" not in level


def test_the_report_says_where_a_plateau_lowered_the_rate() -> None:
    steps = [
        {"step": s, "lr": lr} for s, lr in ((1, 5e-4), (2, 1e-3), (3, 1e-3), (4, 5e-4), (5, 2.5e-4))
    ]
    chart = rate_chart(steps, [(s, 1e-3) for s in range(2, 6)], lowered_by_evals=True)
    assert chart is not None
    assert chart.note == "Lowered by the plateau rule at step 4 to 0.0005, step 5 to 0.00025."
    never = rate_chart(steps[:3], [(3, 1e-3)], lowered_by_evals=True)
    assert never is not None
    assert "never lowered" in never.note


def test_the_report_says_in_words_what_the_gap_did() -> None:
    apart = evals((0.9, 1.0), (0.6, 0.7), (0.65, 0.5), (0.7, 0.4))
    words = overfitting_words(apart)
    assert "Over-fitting since step 20" in words
    assert "0.6000 to 0.7000" in words
    assert "from −0.1000 to +0.3000" in words
    assert "No over-fitting seen" in overfitting_words(apart[:2])
    assert overfitting_words(apart[:1]) == ""
    chart = gap_chart(apart)
    assert chart is not None
    assert chart.note == words
    assert list(chart.figure["data"][0]["y"]) == pytest.approx([-0.1, -0.1, 0.15, 0.3])


def test_the_report_holds_the_applied_rate_against_the_planned_one() -> None:
    steps = [{"step": s, "lr": 1e-3 / s} for s in (1, 2, 3)]
    same = rate_chart(steps, [(s["step"], s["lr"]) for s in steps])
    assert same is not None
    assert same.note == "Applied as planned, at all 3 steps compared."
    off = rate_chart(steps, [(1, 1e-3), (2, 1e-3), (9, 1.0)])
    assert off is not None
    assert off.note == "Applied and planned differ at 1 of 2 steps compared."


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schedule": {"type": "step", "milestones": [0.5], "every_steps": 5}},
         "schedule.milestones"),
        ({"schedule": {"type": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}},
         "schedule.decay_ratio"),
        ({"schedule": {"type": "plateau", "patience": None}}, "schedule.patience"),
        ({"schedule": {"type": "plateau", "metric": "accuracy"}}, "schedule.metric"),
        ({"schedule": {"type": "plateau"}, "data": {"train": "memory://"}}, "schedule.type"),
        ({"schedule": {"type": "plateau"}, "evaluation": {"every_steps": "end"}}, "schedule.type"),
        ({"stop": {"target": 0.5}, "data": {"train": "memory://"}}, "stop.target"),
        ({"stop": {"patience": 2}, "evaluation": {"every_steps": "end"}}, "stop.patience"),
        ({"stop": {"overfitting_evals": 2}, "data": {"train": "memory://"}},
         "stop.overfitting_evals"),
        ({"stop": {"min_delta": 0.1}}, "stop.min_delta"),
        ({"stop": {"max_loss_ratio": 3}, "data": {"train": "memory://"}}, "stop.max_loss_ratio"),
        ({"schedule": {"type": "step", "milestones": []}}, "schedule.milestones"),
        ({"model": {"pretrained": "org/model", "dropout": {}}}, "model.dropout"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(change: dict[str, Any], field: str) -> None:
    assert list(refused({**BASE, **change})) == [field]
