"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.metric import Metric
from orchestrator.plan.chart import text_chart
from orchestrator.plan.schedule import planned_rates
from orchestrator.spec.schedule import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PlateauSchedule,
    PolynomialSchedule,
    ScheduleSpec,
    StepSchedule,
    WSDSchedule,
)

ALL = [
    ConstantSchedule(type="constant", warmup_steps=4),
    LinearSchedule(warmup_steps=4, min_lr_ratio=0.1),
    CosineSchedule(type="cosine", warmup_steps=4, min_lr_ratio=0.1),
    PolynomialSchedule(type="polynomial", warmup_steps=4, min_lr_ratio=0.1),
    ExponentialSchedule(type="exponential", warmup_steps=4),
    StepSchedule(type="step", warmup_steps=4),
    WSDSchedule(type="wsd", warmup_steps=4, min_lr_ratio=0.1),
    PlateauSchedule(type="plateau", warmup_steps=4),
]


LOSS = Metric.named("loss")


def with_warmup(kind: ScheduleSpec, steps: int | None, ratio: float | None) -> ScheduleSpec:
    return kind.model_copy(update={"warmup_steps": steps, "warmup_ratio": ratio})


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: ScheduleSpec) -> None:
    assert [schedule.lr_factor(s, 20) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
def test_without_warm_up_the_first_step_has_the_peak_rate(schedule: ScheduleSpec) -> None:
    assert with_warmup(schedule, None, None).lr_factor(0, 20) == 1
    assert with_warmup(schedule, 0, None).lr_factor(0, 20) == 1


def test_a_constant_rate_stays_at_the_peak() -> None:
    assert {ALL[0].lr_factor(s, 20) for s in range(4, 21)} == {1.0}


def test_a_linear_rate_falls_by_equal_amounts_to_its_floor() -> None:
    got = [ALL[1].lr_factor(s, 20) for s in range(4, 21)]
    assert got == pytest.approx([0.1 + 0.9 * (16 - i) / 16 for i in range(17)])


def test_a_cosine_rate_is_half_way_down_in_the_middle_and_ends_at_its_floor() -> None:
    assert ALL[2].lr_factor(12, 20) == pytest.approx(0.55)
    assert ALL[2].lr_factor(20, 20) == pytest.approx(0.1)
    assert ALL[2].lr_factor(8, 20) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)


@given(
    st.sampled_from(ALL),
    st.integers(1, 300),
    st.one_of(
        st.tuples(st.integers(0, 400), st.none()),
        st.tuples(st.none(), st.floats(0, 1, exclude_max=True)),
    ),
)
def test_every_step_has_a_rate_that_only_rises_then_only_falls(
    kind: ScheduleSpec, total: int, warmup: tuple[int | None, float | None]
) -> None:
    schedule = with_warmup(kind, *warmup)
    warm = schedule.total_warmup_steps(total)
    assert 0 <= warm < max(total, 1), "a warm-up always leaves a step at the peak"
    factors = [schedule.lr_factor(s, total) for s in range(total)]
    assert all(0 < f <= 1 for f in factors), "no step is spent at rate 0"
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert factors[warm] == 1


def test_a_warm_up_must_end_before_training_does() -> None:
    LinearSchedule(warmup_steps=9).check(10)
    for steps in (10, 1000):
        with pytest.raises(PlanError, match=rf"warmup_steps = {steps}: there are 10 steps"):
            LinearSchedule(warmup_steps=steps).check(10)


def test_restarts_need_room_for_cosines_of_two_steps() -> None:
    for restarts, total in ((0, 1), (4, 10), (3, 10)):
        CosineSchedule(type="cosine", restarts=restarts).check(total)
    for restarts, total, warm in ((5, 10, 0), (4, 10, 2), (5000, 300, 0)):
        schedule = CosineSchedule(type="cosine", restarts=restarts, warmup_steps=warm)
        with pytest.raises(PlanError, match=rf"restarts = {restarts}.*room for"):
            schedule.check(total)


def test_a_warm_up_ratio_counts_all_steps() -> None:
    assert LinearSchedule(warmup_ratio=0.1).total_warmup_steps(200) == 20
    assert LinearSchedule(warmup_steps=500).total_warmup_steps(200) == 199


def test_a_schedule_of_a_kind_is_what_its_source_says() -> None:
    def at(schedule: ScheduleSpec, *steps: int) -> list[float]:
        return [schedule.lr_factor(s, 100) for s in steps]

    assert at(PolynomialSchedule(type="polynomial", power=2), 0, 50, 100) == [1, 0.25, 0]
    exponential = ExponentialSchedule(type="exponential", min_lr_ratio=0.01)
    assert at(exponential, 0, 50, 100) == pytest.approx([1, 0.1, 0.01])
    step = StepSchedule(type="step")
    assert at(step, 0, 49, 50, 74, 75) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    every = StepSchedule(type="step", every_steps=10, gamma=0.5, warmup_steps=5)
    assert at(every, 5, 14, 15, 25) == [1, 1, 0.5, 0.25]
    root = InverseSqrtSchedule(type="inverse_sqrt", warmup_steps=4)
    assert at(root, 3, 15, 63) == [1, 0.5, 0.25]
    assert at(InverseSqrtSchedule(type="inverse_sqrt"), 0, 3, 99) == [1, 0.5, 0.1]
    restarted = CosineSchedule(type="cosine", restarts=1)
    assert at(restarted, 0, 25, 50, 75) == pytest.approx([1, 0.5, 1, 0.5])
    assert restarted.lr_factor(49, 100) < 0.01


@pytest.mark.parametrize(
    ("shape", "half_way"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)]
)
def test_warm_up_stable_decay_holds_the_peak_and_decays_at_the_end(
    shape: str, half_way: float
) -> None:
    schedule = WSDSchedule(type="wsd", warmup_steps=10, decay_ratio=0.2, shape=shape)
    factors = [schedule.lr_factor(s, 100) for s in range(101)]
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(half_way)
    assert factors[100] == pytest.approx(0)


def plateau(**fields: Any) -> PlateauSchedule:
    return PlateauSchedule(type="plateau", **fields)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1, width=16), max_size=30),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.125]),
    st.booleans(),
)
def test_the_rate_drops_on_a_plateau_as_torchs_does(
    values: list[float], patience: int, cooldown: int, min_delta: float, higher: bool
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max" if higher else "min",
        factor=0.5,
        patience=patience - 1,  # theirs tolerates so many, ours acts on as many
        threshold=min_delta,
        threshold_mode="abs",
        cooldown=cooldown,
        eps=0,
    )
    for value in values:
        theirs.step(value)
    ours = plateau(patience=patience, cooldown=cooldown, min_delta=min_delta)
    assert ours.evaluation_factor(values, Metric("m", higher)) == optimizer.param_groups[0]["lr"]


def test_the_rate_drops_once_at_each_threshold_of_the_loss() -> None:
    schedule = plateau(patience=None, thresholds=(0.5, 0.2), factor=0.1)
    losses = [0.9, 0.6, 0.5, 0.7, 0.4, 0.1, 0.3]
    got = [schedule.evaluation_factor(losses[:n], LOSS) for n in range(len(losses) + 1)]
    assert got == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_a_value_that_is_not_finite_is_no_better_and_the_floor_holds() -> None:
    schedule = plateau(patience=1, factor=0.1, min_lr_ratio=0.05)
    assert schedule.evaluation_factor([0.5, math.nan], LOSS) == 0.1
    assert schedule.evaluation_factor([math.inf, 0.5, math.nan, 0.6], LOSS) == 0.05


def test_planned_rates_hold_the_first_and_the_last_step() -> None:
    rates = planned_rates(LinearSchedule(), 0.1, 1000)
    assert len(rates) <= 202
    assert rates[0] == (1, 0.1)
    assert rates[-1] == (1000, pytest.approx(0.0001))
    assert planned_rates(LinearSchedule(), 0.1, 1) == ((1, 0.1),)


def test_the_text_chart_rises_and_falls_with_the_rate() -> None:
    schedule = LinearSchedule(warmup_steps=50)
    lines = text_chart(lambda s: schedule.lr_factor(s, 100), 100, "5e-05", width=20, height=3)
    assert lines[0].startswith("5e-05 ┤")
    assert lines[0][7:].strip() == "▂▅▇▇▅▂"
    assert set(lines[2][10:24]) == {"█"}
    assert lines[-1].endswith("100")
