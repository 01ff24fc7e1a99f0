"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.schedule import lr_factor, warmup_steps
from orchestrator.spec.optimization import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleSpec,
)

ALL = [
    ConstantSchedule(type="constant", warmup_steps=4),
    LinearSchedule(warmup_steps=4, min_lr_ratio=0.1),
    CosineSchedule(type="cosine", warmup_steps=4, min_lr_ratio=0.1),
]


def with_warmup(kind: ScheduleSpec, steps: int | None, ratio: float | None) -> ScheduleSpec:
    return kind.model_copy(update={"warmup_steps": steps, "warmup_ratio": ratio})


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: ScheduleSpec) -> None:
    assert [lr_factor(schedule, s, 20) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
def test_without_warm_up_the_first_step_has_the_peak_rate(schedule: ScheduleSpec) -> None:
    assert lr_factor(with_warmup(schedule, None, None), 0, 20) == 1
    assert lr_factor(with_warmup(schedule, 0, None), 0, 20) == 1


def test_a_constant_rate_stays_at_the_peak() -> None:
    assert {lr_factor(ALL[0], s, 20) for s in range(4, 21)} == {1.0}


def test_a_linear_rate_falls_by_equal_amounts_to_its_floor() -> None:
    got = [lr_factor(ALL[1], s, 20) for s in range(4, 21)]
    assert got == pytest.approx([0.1 + 0.9 * (16 - i) / 16 for i in range(17)])


def test_a_cosine_rate_is_half_way_down_in_the_middle_and_ends_at_its_floor() -> None:
    assert lr_factor(ALL[2], 12, 20) == pytest.approx(0.55)
    assert lr_factor(ALL[2], 20, 20) == pytest.approx(0.1)
    assert lr_factor(ALL[2], 8, 20) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)


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
    warm = warmup_steps(schedule, total)
    assert 0 <= warm < max(total, 1), "a warm-up always leaves a step at the peak"
    factors = [lr_factor(schedule, s, total) for s in range(total)]
    assert all(0 < f <= 1 for f in factors), "no step is spent at rate 0"
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert factors[warm] == 1


def test_a_warm_up_ratio_counts_all_steps() -> None:
    assert warmup_steps(LinearSchedule(warmup_ratio=0.1), 200) == 20
    assert warmup_steps(LinearSchedule(warmup_steps=500), 200) == 199
