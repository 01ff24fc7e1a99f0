"""What a sweep proposes: a pure function of the sweep, the trial's number and what was seen before."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spec import refused

from orchestrator.errors import OrchestratorError
from orchestrator.metric import Metric
from orchestrator.report.trial_log import Decision, SweepLog
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.expression import Expression, ExpressionError
from orchestrator.spec.search_space import default_trials, grid, keeps
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.sweep_rules import with_values
from orchestrator.sweep.space import Past, perturbed, propose

LR = "optimizer.lr"
SPACE: dict[str, Any] = {
    "optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3},
    "optimizer.weight_decay": [0, 0.01, 0.1],
    "schedule.warmup_ratio": {"type": "uniform", "low": 0.0, "high": 0.3},
    "batch.global_batch_size": {"type": "int_uniform", "low": 8, "high": 64},
}


def sweep(space: dict[str, Any] | None = None, **fields: Any) -> SweepSpec:
    return SweepSpec.model_validate({"space": space or SPACE, **fields})


Row = tuple[dict[str, Any], float]
"""A trial's values, and its metric at its last step."""


def past(asked: SweepSpec, rows: Sequence[Row] = (), maximize: bool = True) -> Past:
    found = Past(asked, Metric("accuracy", maximize))
    for values, value in rows:
        found.add(values, [(5, value / 2), (15, value)])
    return found


# --- proposals


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_proposal_depends_on_nothing_but_sweep_number_and_what_was_seen(searcher: str) -> None:
    asked = sweep(searcher={"type": searcher}, seed=3)
    before: list[Row] = []
    grown = past(asked)
    for index in range(14):
        values = propose(asked, index, grown)
        assert values is not None
        again = sweep(searcher={"type": searcher}, seed=3)
        assert propose(again, index, past(again, before)) == values, "as after a resume"
        assert values not in [b for b, _ in before]
        before.append((values, -abs(math.log10(values["optimizer.lr"]) + 4)))
        grown.add(values, [(15, before[-1][1])])
    other = sweep(searcher={"type": searcher}, seed=4)
    assert propose(other, 0, past(other)) != before[0][0]


def test_random_proposals_do_not_look_at_the_trials_before() -> None:
    asked = sweep()
    shown = past(asked, [({"optimizer.lr": 1e-4}, 0.5)])
    assert propose(asked, 5, past(asked)) == propose(asked, 5, shown)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 10_000))
def test_proposals_lie_in_the_space(seed: int, index: int) -> None:
    values = propose(sweep(seed=seed), index, past(sweep(seed=seed)))
    assert values is not None
    assert list(values) == list(SPACE), "in the order of the space"
    assert 1e-5 <= values["optimizer.lr"] <= 1e-3
    assert values["optimizer.weight_decay"] in (0, 0.01, 0.1)
    assert 0 <= values["schedule.warmup_ratio"] <= 0.3
    assert 8 <= values["batch.global_batch_size"] <= 64


def test_logarithmic_draws_are_uniform_in_the_exponent() -> None:
    asked = sweep({"optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}})
    drawn = [propose(asked, i, past(asked))["optimizer.lr"] for i in range(400)]  # type: ignore[index]
    assert 0.4 < sum(v < 1e-4 for v in drawn) / 400 < 0.6


def test_both_ends_of_whole_numbers_are_drawn() -> None:
    asked = sweep({"batch.global_batch_size": {"type": "int_uniform", "low": 1, "high": 3}})
    drawn = {propose(asked, i, past(asked))["batch.global_batch_size"] for i in range(60)}  # type: ignore[index]
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize("maximize", [True, False])
def test_the_estimator_draws_near_what_was_good(maximize: bool) -> None:
    asked = sweep(
        {"optimizer.lr": SPACE["optimizer.lr"]}, searcher={"type": "tpe", "startup_trials": 5}
    )
    sign = 1 if maximize else -1
    rates = [10 ** (-5 + 2 * i / 29) for i in range(30)]
    rows = [({"optimizer.lr": lr}, -sign * abs(math.log10(lr) + 3.5)) for lr in rates]
    before = past(asked, rows, maximize)
    drawn = [propose(asked, i, before)["optimizer.lr"] for i in range(30, 50)]  # type: ignore[index]
    near = sum(abs(math.log10(v) + 3.5) < 0.5 for v in drawn)
    assert near >= 15


def test_the_estimator_learns_which_choices_were_good() -> None:
    space = {"optimizer": [{"type": "adamw"}, {"type": "sgd", "lr": 0.1}]}
    asked = sweep(space, searcher={"type": "tpe", "startup_trials": 2})
    good, bad = ({"optimizer": choice} for choice in space["optimizer"])
    before = past(asked, [(good, 0.9), (bad, 0.1), (good, 0.8), (bad, 0.2)] * 3)
    drawn = [propose(asked, index, before) for index in range(20)]
    assert sum(values == good for values in drawn) >= 14


def test_a_searcher_learns_from_what_ended_well_as_it_ends_and_never_twice(tmp_path: Path) -> None:
    log = SweepLog(tmp_path / "trials.jsonl", Metric("loss", maximize=False))
    asked = sweep({LR: SPACE[LR]}, searcher={"type": "tpe"})
    found = Past(asked, Metric("loss", maximize=False))

    def learned() -> list[float]:
        found.follow(log)
        return [t.value for t in found.study().trials]

    for index, name in enumerate("abcd"):
        log.trial(name, index, {LR: 1e-4}, None)
    log.report("a", 15, 15.0, {"loss": 0.2}, Decision(False, True))
    log.report("b", 5, 5.0, {"loss": 0.5}, Decision(True, True))
    log.end("c", "diverged", 2)
    assert learned() == []
    log.end("a", "pruned", 15)
    assert learned() == [0.2]
    log.report("b", 15, 15.0, {"loss": 0.4}, Decision(True, True))
    log.report("d", 5, 5.0, {"loss": 9.0}, Decision(True, True))
    log.end("d", "failed", 7)
    log.end("b", "finished", 15)
    assert learned() == [0.2, 0.4]
    assert learned() == [0.2, 0.4]


def test_many_trials_do_not_make_a_proposal_slow() -> None:
    asked = sweep({LR: SPACE[LR]}, searcher={"type": "tpe"})
    rows = [({LR: 10 ** (-5 + 2 * i / 999)}, i / 999) for i in range(1000)]
    grown = past(asked, rows)
    began = time.perf_counter()
    for index in range(1000, 1020):
        assert propose(asked, index, grown)
    each_s = (time.perf_counter() - began) / 20
    began = time.perf_counter()
    propose(asked, 1020, past(asked, rows))
    assert each_s < (time.perf_counter() - began) / 2, "what was learned once is not learned again"


# --- grids, conditions, constraints


def test_a_grid_has_every_combination_once_the_last_field_fastest() -> None:
    asked = sweep({"seed": [1, 2], "optimizer.lr": [0.1, 0.2, 0.3]}, searcher={"type": "grid"})
    rows = [(v["seed"], v["optimizer.lr"]) for v in grid(asked)]
    assert rows == [(s, lr) for s in (1, 2) for lr in (0.1, 0.2, 0.3)]
    assert default_trials(asked) == 6
    assert propose(asked, 5, past(asked)) == {"seed": 2, "optimizer.lr": 0.3}
    assert propose(asked, 6, past(asked)) is None


def test_a_condition_that_does_not_hold_leaves_the_field_out() -> None:
    space = {
        "optimizer.momentum": {"type": "choice", "values": [0.0, 0.9], "when": {"optimizer.type": "sgd"}},
        "optimizer.nesterov": {"type": "choice", "values": [True, False], "when": {"optimizer.momentum": 0.9}},
        "optimizer.type": ["sgd", "adamw"],
    }  # fmt: skip
    rows = list(grid(sweep(space, searcher={"type": "grid"})))
    assert rows == [
        {"optimizer.momentum": 0.0, "optimizer.type": "sgd"},
        {"optimizer.type": "adamw"},
        {"optimizer.momentum": 0.9, "optimizer.nesterov": True, "optimizer.type": "sgd"},
        {"optimizer.momentum": 0.9, "optimizer.nesterov": False, "optimizer.type": "sgd"},
    ]
    for index in range(30):
        assert propose(sweep(space), index, past(sweep(space))) in rows


def test_fields_that_wait_for_each_other_are_never_set() -> None:
    space = {
        "seed": {"type": "choice", "values": [1], "when": {"batch.global_batch_size": 8}},
        "batch.global_batch_size": {"type": "choice", "values": [8], "when": {"seed": 1}},
    }
    assert propose(sweep(space), 0, past(sweep(space))) == {}


def test_every_proposal_keeps_the_constraints() -> None:
    rule = "optimizer.lr * batch.global_batch_size < 0.005"
    for searcher in ({"type": "random"}, {"type": "tpe", "startup_trials": 1}):
        asked = sweep(constraints=[rule], searcher=searcher)
        before = past(asked)
        for index in range(12):
            values = propose(asked, index, before)
            assert values is not None
            assert values["optimizer.lr"] * values["batch.global_batch_size"] < 0.005
            before.add(values, [(15, values["optimizer.lr"])])
    cells = sweep({"seed": [1, 2, 3]}, searcher={"type": "grid"}, constraints=["seed != 2"])
    assert [v["seed"] for v in grid(cells)] == [1, 3]


def test_constraints_that_nothing_keeps_end_with_a_message() -> None:
    impossible = sweep(constraints=["optimizer.lr > 1"])
    with pytest.raises(OrchestratorError, match=r"none of 1000 draws keeps.*Widen the space"):
        propose(impossible, 0, past(impossible))


# --- perturbation


def test_a_neighbor_moves_every_field_a_little() -> None:
    asked = sweep()
    values = dict(zip(SPACE, (1e-4, 0.01, 0.1, 20), strict=True))
    for member in range(20):
        near = perturbed(asked, values, 0.0, 1, member)
        assert near == perturbed(asked, values, 0.0, 1, member)
        assert near["optimizer.lr"] in (pytest.approx(0.8e-4), pytest.approx(1.2e-4))
        assert near["optimizer.weight_decay"] in (0, 0.1)
        assert near["batch.global_batch_size"] in (16, 24)
    drawn = {perturbed(asked, values, 0.0, 1, m)["optimizer.lr"] for m in range(20)}
    assert len(drawn) == 2


def test_a_neighbor_stays_inside_the_bounds() -> None:
    asked = sweep()
    edge = dict(zip(SPACE, (1e-3, 0.1, 0.3, 64), strict=True))
    for member in range(20):
        near = perturbed(asked, edge, 0.25, 2, member)
        assert near["optimizer.lr"] <= 1e-3
        assert near["schedule.warmup_ratio"] <= 0.3
        assert near["batch.global_batch_size"] <= 64


def test_a_resampled_neighbor_is_drawn_anew() -> None:
    asked = sweep({"optimizer.lr": SPACE["optimizer.lr"]})
    drawn = {perturbed(asked, {"optimizer.lr": 1e-4}, 1.0, 1, m)["optimizer.lr"] for m in range(10)}
    assert len(drawn) == 10


# --- expressions


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a.b * c < 10", True),
        ("a.b * c <= 5.9", False),
        ("1 < a.b < c", True),
        ("a.b ** 2 + 1 == 5 and not c > 4", True),
        ("c / a.b - 1.5 != 0", False),
        ("a.b > 100 or c == 3", True),
        ("-c < 0", True),
        ("word == 'yes'", True),
        ("missing > 1", True),
        ("a.b / (c - 3) > 0", False),
        ("word < 3", False),
    ],
)
def test_comparisons_read_as_they_are_written(text: str, holds: bool) -> None:
    assert Expression(text).holds({"a.b": 2, "c": 3, "word": "yes"}) is holds


def test_an_expression_names_its_fields() -> None:
    names = Expression("optimizer.lr * batch.global_batch_size < 0.1").names
    assert names == {"optimizer.lr", "batch.global_batch_size"}


@pytest.mark.parametrize(
    "text",
    [
        "a <", "a + b", "f(a) < 1", "a[0] < 1", "__import__('os') == 1", "(lambda: 1) == 1",
        "[a] == 1", "a if b else c", "a.b().c < 1", "a", "x in y", "a is b",
    ],
)  # fmt: skip
def test_anything_but_a_comparison_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


def test_a_constraint_on_a_field_that_a_trial_lacks_is_kept() -> None:
    asked = sweep(constraints=["optimizer.momentum > 1"])
    assert keeps(asked, {"optimizer.lr": 0.1})


# --- rules


def job(tmp_path: Path, **fields: Any) -> dict[str, Any]:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(4))
    data = {"train": str(rows), "eval": str(rows)}
    model = {"pretrained": str(tmp_path)}
    given = {"name": "s", "task": {"type": "text_classification"}, "model": model, "data": data}
    return {**given, **fields}


PBT: dict[str, Any] = {"scheduler": {"type": "pbt"}}


@pytest.mark.parametrize(
    ("space", "field", "why"),
    [
        ({"optimizer.lrr": [1]}, "optimizer.lrr", "did you mean"),
        ({LR: [1e-4, -1]}, LR, "refuses -1"),
        ({LR: {"type": "uniform", "low": 2, "high": 1}}, f"{LR}.low", "below `high`"),
        ({"name": ["a"]}, "name", "belongs to the run"),
        ({"evaluation.every_steps": [1]}, "evaluation.every_steps", "belongs to the run"),
        ({"seed": {"values": [1], "when": {LR: 1}}}, "seed.when", "not another searched"),
    ],
)
def test_a_field_that_cannot_be_searched_is_named(
    tmp_path: Path, space: dict[str, Any], field: str, why: str
) -> None:
    assert why in refused(job(tmp_path, sweep={"space": space}))[f"sweep.space.{field}"]


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"constraints": ["seed <"]}, "constraints.0", "not an expression"),
        ({"constraints": ["seed < 9", "sed < 1"]}, "constraints.1", "'sed' is not searched"),
        ({**PBT, "num_trials": 3}, "num_trials", "4 or more"),
        ({**PBT, "searcher": {"type": "grid"}}, "searcher", "at random"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    tmp_path: Path, fields: dict[str, Any], field: str, why: str
) -> None:
    found = refused(job(tmp_path, sweep={"space": {"seed": [1]}, **fields}))
    assert why in found[f"sweep.{field}"]


def test_a_grid_needs_lists_and_a_population_fields_that_a_checkpoint_allows(
    tmp_path: Path,
) -> None:
    between = {LR: {"type": "uniform", "low": 0.1, "high": 0.2}}
    found = refused(job(tmp_path, sweep={"space": between, "searcher": {"type": "grid"}}))
    assert "needs a list of values" in found[f"sweep.space.{LR}"]
    found = refused(job(tmp_path, sweep={"space": {"batch.global_batch_size": [8]}, **PBT}))
    assert "cannot be taken over" in found["sweep.space.batch.global_batch_size"]


@pytest.mark.parametrize(
    ("space", "refuses"),
    [
        ({"optimizer.type": ["adamw", "lion"]}, True),
        ({"optimizer": [{"type": "adamw"}, {"type": "lion"}]}, True),
        ({"optimizer.layer_decay": [0.8, 1.0]}, True),
        ({"optimizer.layer_decay": {"type": "uniform", "low": 0.7, "high": 0.9}}, False),
        ({"optimizer.head_lr": [None, 1e-3]}, True),
        ({"precision": ["bf16", "fp32"]}, True),
        ({"regularization.averaging.type": ["none", "ema"]}, True),
        ({"regularization.l1": [0.0, 1e-4], "schedule.warmup_ratio": [0.0, 0.1]}, False),
        ({"optimizer.weight_decay": [0.0, 0.1], "optimizer.lr": [1e-4, 1e-3]}, False),
    ],
)
def test_a_population_takes_checkpoints_over_only_where_their_state_fits(
    tmp_path: Path, space: dict[str, Any], refuses: bool
) -> None:
    given = job(tmp_path, sweep={"space": space, **PBT})
    if not refuses:
        assert parse_spec(given).sweep is not None
        return
    assert "cannot be taken over" in refused(given)[f"sweep.space.{next(iter(space))}"]


def test_a_kind_that_does_not_take_the_jobs_fields_is_searched_as_a_whole_section(
    tmp_path: Path,
) -> None:
    full = {"type": "full", "freeze": ["*embeddings*"]}
    by_path = job(tmp_path, tuning=full, sweep={"space": {"tuning.type": ["full", "lora"]}})
    found = refused(by_path)["sweep.space.tuning.type"]
    assert "refuses 'lora'" in found
    assert "search the section whole: tuning: [" in found
    space = {"tuning": [full, {"type": "lora", "r": 4}]}
    assert parse_spec(job(tmp_path, tuning=full, sweep={"space": space})).sweep is not None


def test_all_problems_of_a_sweep_come_at_once(tmp_path: Path) -> None:
    found = refused(job(tmp_path, sweep={"space": {"sed": [1], LR: [-1]}, "constraints": ["x"]}))
    assert set(found) == {"sweep.space.sed", f"sweep.space.{LR}", "sweep.constraints.0"}


def test_a_sweep_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    given = job(tmp_path, sweep={"space": {"seed": [1]}})
    given["data"].pop("eval")
    assert "compares trials on held-out rows" in refused(given)["sweep"]


def test_a_conditional_field_is_checked_where_its_condition_holds(tmp_path: Path) -> None:
    space = {
        "optimizer.type": ["adamw", "sgd"],
        "optimizer.momentum": {"type": "uniform", "low": 0.5, "high": 0.9, "when": {"optimizer.type": "sgd"}},
    }  # fmt: skip
    assert parse_spec(job(tmp_path, sweep={"space": space})).sweep is not None


def test_values_are_set_by_path_and_the_rest_stays_as_written(tmp_path: Path) -> None:
    spec: JobSpec = parse_spec(job(tmp_path, seed=7, sweep={"space": {"optimizer.lr": [1e-3]}}))
    data = with_values(spec, {"optimizer.lr": 1e-3, "schedule.warmup_ratio": 0.2})
    trial = parse_spec(data)
    assert (trial.optimizer.lr, trial.schedule.warmup_ratio) == (1e-3, 0.2)
    assert (trial.seed, trial.sweep) == (7, None)
    assert with_values(spec, {})["seed"] == 7
    assert spec.optimizer.lr != 1e-3


def test_sections_are_set_before_their_fields(tmp_path: Path) -> None:
    spec: JobSpec = parse_spec(job(tmp_path))
    values = {"optimizer.lr": 0.5, "optimizer": {"type": "sgd"}}
    assert with_values(spec, values)["optimizer"] == {"type": "sgd", "lr": 0.5}


@pytest.mark.parametrize("searcher", [{"type": "random"}, {"type": "tpe"}, {"type": "grid"}])
def test_a_space_in_which_no_trial_can_run_is_refused_when_the_job_is_read(
    tmp_path: Path, searcher: dict[str, Any]
) -> None:
    choices = {LR: [1e-5, 1e-4]}
    empty = {"space": choices, "constraints": ["optimizer.lr > 1"], "searcher": searcher}
    assert "keeps" in str(refused(job(tmp_path, sweep=empty)))
    wide = {"space": {"batch.micro_batch_size": [64, 128]}, "searcher": searcher}
    found = refused(job(tmp_path, batch={"global_batch_size": 32}, sweep=wide))
    assert "no trial could run: batch.micro_batch_size" in found["sweep.space"]
    some = {"space": {"batch.micro_batch_size": [8, 128]}, "searcher": searcher}
    assert parse_spec(job(tmp_path, batch={"global_batch_size": 32}, sweep=some)).sweep is not None


def test_a_job_that_is_wrong_itself_is_not_said_to_be_so_for_its_space(tmp_path: Path) -> None:
    wrong = {"global_batch_size": 32, "micro_batch_size": 64}
    found = refused(job(tmp_path, batch=wrong, sweep={"space": {LR: [1e-5, 1e-4]}}))
    assert set(found) == {"batch.micro_batch_size"}


def test_a_trial_that_ended_without_a_number_does_not_stop_the_estimator() -> None:
    asked = sweep(searcher={"type": "tpe", "startup_trials": 1})
    values = propose(asked, 0, past(asked))
    assert values is not None
    good, also = (past(asked, [(values, 0.5)]) for _ in range(2))
    also.add(values, [(5, 0.3), (15, math.nan)])
    also.add(values, [])
    assert propose(asked, 3, also) == propose(asked, 3, good)


def test_a_grid_is_walked_once_however_many_points_are_asked_for() -> None:
    asked = sweep({"seed": list(range(3000)), LR: [0.1, 0.2]}, searcher={"type": "grid"})
    began = time.perf_counter()
    rows = [propose(asked, index, past(asked)) for index in range(0, 6000, 10)]
    assert [row["seed"] for row in rows if row] == list(range(0, 3000, 5))
    assert time.perf_counter() - began < 5, "of which the walk takes some tenths"
