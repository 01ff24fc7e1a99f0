"""The plan of a sweep and the scheduler's decisions: numbers with reasons, the same after a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from test_plan import prepared

from orchestrator.errors import PlanError, RunExistsError, SpecError
from orchestrator.metric import Metric
from orchestrator.plan import Cluster
from orchestrator.plan.cluster import GIB, Node
from orchestrator.report.trial_log import Decision, SweepLog
from orchestrator.run_folder import SweepFolder, write_json
from orchestrator.spec import JobSpec
from orchestrator.sweep.controller import MOST_LOST, NO_MORE, SweepController
from orchestrator.sweep.decisions import SchedulerDecisions
from orchestrator.sweep.plan import SweepPlan, expected_at, plan_sweep, plan_trial
from orchestrator.sweep.run import _locked_sweep

SPACE = {"optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}}
FOUR_CPUS = Cluster(source="described", nodes=(Node(cpus=4, memory_bytes=32 * GIB),))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.labeled(4))


@pytest.fixture
def job(models: tiny.Tiny, rows: Path, tmp_path: Path) -> Any:
    """A job with a sweep section: `job(scheduler=…, resources=…)`."""

    def make(steps: int = 90, resources: dict[str, Any] | None = None, **sweep: Any) -> JobSpec:
        return tiny.job(
            models.bert, rows, tmp_path, data={"eval": str(rows)}, stop={"max_steps": steps},
            batch={"global_batch_size": 10}, resources=resources or {}, sweep={"space": SPACE, **sweep},
        )  # fmt: skip

    return make


def planned(spec: JobSpec, cluster: Cluster = FOUR_CPUS) -> SweepPlan:
    return plan_sweep(spec, cluster, prepared(rows=1000, longest=20, eval_rows=50))


# --- the plan


def test_slots_are_as_many_as_the_cluster_holds(job: Any) -> None:
    assert planned(job(num_trials=12)).slots == 4
    assert planned(job(num_trials=3)).slots == 3, "no more than there are trials"
    assert planned(job(num_trials=12, resources={"num_workers": 2})).slots == 2
    assert planned(job(num_trials=12, resources={"cpus_per_worker": 3})).slots == 1
    wide = planned(job(num_trials=12, resources={"cpus_per_worker": 2}))
    assert (wide.slots, wide.base.num_workers) == (2, 1)
    two_gpus = Node(
        cpus=16, memory_bytes=64 * GIB, gpus=2, gpu_name="A100", gpu_memory_bytes=80 * GIB
    )
    gpus = Cluster(source="described", nodes=(two_gpus, two_gpus))
    assert planned(job(num_trials=12), gpus).slots == 4
    assert planned(job(num_trials=12, max_concurrent_trials=2)).slots == 2
    assert "4 CPUs, 1 × 1 per trial" in planned(job(num_trials=12)).reasons["slots"]


def test_a_slot_has_its_share_of_the_cluster(job: Any) -> None:
    base = planned(job(num_trials=12)).base
    assert base.num_workers == 1
    assert sum(node.cpus for node in base.cluster.nodes) == 1
    assert base.spec.sweep is None


def test_a_job_without_a_sweep_section_is_told_so(job: Any) -> None:
    spec = job()
    with pytest.raises(PlanError, match="no `sweep:` section"):
        planned(spec.model_copy(update={"sweep": None}))


@pytest.mark.parametrize(
    ("scheduler", "rungs"),
    [
        ({"type": "asha"}, (10, 30, 90)),
        ({"type": "asha", "grace_period": 4}, (4, 12, 36, 90)),
        ({"type": "asha", "reduction_factor": 2}, (23, 46, 90)),
        ({"type": "asha", "grace_period": 100}, (90,)),
        ({"type": "asha", "unit": "rows", "grace_period": 100}, (10, 30, 90)),
        ({"type": "asha", "unit": "tokens", "grace_period": 2000}, (10, 30, 90)),
        ({"type": "asha", "unit": "rows", "grace_period": 95}, (10, 29, 86, 90)),
        ({"type": "median"}, (10, 90)),
        ({"type": "median", "grace_period": 20}, (20, 90)),
        ({"type": "pbt", "generations": 4}, (23, 45, 68, 90)),
        ({"type": "none"}, (90,)),
    ],
)
def test_rungs_follow_the_scheduler_and_end_with_the_job(
    job: Any, scheduler: dict[str, Any], rungs: tuple[int, ...]
) -> None:
    assert planned(job(scheduler=scheduler, num_trials=8)).rungs == rungs


def test_a_third_goes_on_at_each_rung_and_one_always_does(job: Any) -> None:
    plan = planned(job(num_trials=27))
    assert plan.expected == (27, 9, 3)
    assert plan.expected_steps == 27 * 10 + 9 * 20 + 3 * 60
    assert planned(job(num_trials=2)).expected == (2, 1, 1)
    everyone = planned(job(num_trials=8, scheduler={"type": "none"}))
    assert (everyone.expected, everyone.expected_steps) == ((8,), 720)


def test_median_stopping_spares_the_first_and_halves_the_rest(job: Any) -> None:
    sweep = job(scheduler={"type": "median", "min_trials": 3}).sweep
    assert expected_at(sweep, 11, (10, 90)) == (11, 7)
    assert expected_at(sweep, 2, (10, 90)) == (2, 2)


def test_a_sweep_too_small_for_its_scheduler_is_warned(job: Any) -> None:
    assert "little is pruned" in planned(job(num_trials=6)).warnings[0]
    assert planned(job(num_trials=9)).warnings == ()
    population = planned(job(num_trials=6, scheduler={"type": "pbt"}))
    assert "leaves some idle" in population.warnings[0]


def test_a_trial_has_its_own_values_folder_and_rungs(job: Any) -> None:
    plan = planned(job(num_trials=9))
    values = {"optimizer.lr": 1e-4, "batch.global_batch_size": 20, "stop.max_steps": 45}
    trial = plan_trial(plan, "t00007", values, prepared(rows=1000, longest=20, eval_rows=50))
    assert (trial.spec.optimizer.lr, trial.global_batch_size) == (1e-4, 20)
    assert Path(trial.run_dir) == Path(plan.run_dir) / "trials" / "t00007"
    assert trial.rungs == (10, 30, 45), "the rungs of the job, at which it meets the others"
    by_rows = planned(
        job(num_trials=9, scheduler={"type": "asha", "unit": "rows", "grace_period": 100})
    )
    fewer = plan_trial(by_rows, "t", {"batch.global_batch_size": 20}, prepared(1000, 20, 50))
    assert fewer.rungs == (5, 15, 45, 90), "rungs in rows: half the steps at twice the batch"


def test_values_that_no_trial_can_have_are_an_error(job: Any) -> None:
    plan = planned(job(num_trials=9))
    with pytest.raises(SpecError, match=r"optimizer\.lr"):
        plan_trial(plan, "t", {"optimizer.lr": -1}, prepared(1000, 20, 50))


def test_a_plan_survives_json(job: Any) -> None:
    plan = planned(job(num_trials=9))
    assert SweepPlan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("space", "scheduler", "until"),
    [
        ({"schedule.warmup_ratio": {"type": "uniform", "low": 0.0, "high": 0.3}}, {"type": "asha"}, 27),
        ({"schedule.warmup_steps": [0, 40]}, {"type": "asha"}, 40),
        ({"schedule.warmup_steps": [0, 40]}, {"type": "median", "grace_period": 30}, 40),
        ({"schedule.warmup_steps": [0, 40]}, {"type": "asha", "grace_period": 40}, None),
        ({"schedule.warmup_steps": [0, 40]}, {"type": "none"}, None),
        (SPACE, {"type": "asha"}, None),
    ],
)  # fmt: skip
def test_a_comparison_before_warm_up_has_ended_is_warned_of(
    job: Any, space: dict[str, Any], scheduler: dict[str, Any], until: int | None
) -> None:
    plan = planned(job(num_trials=9, space=space, scheduler=scheduler))
    said = [text for text in plan.warnings if "warm-up" in text]
    assert [f"until step {until:,}:" in text for text in said] == ([] if until is None else [True])


# --- the scheduler's decisions


def told(
    plan: SweepPlan, path: Path, curves: list[list[float]], resume_after: int | None = None
) -> list[tuple[str, int, Decision]]:
    """Every decision where trials take turns at their rungs; a new instance takes over after some of them."""
    log, out = SweepLog(path, Metric("accuracy", maximize=True)), []
    decisions = SchedulerDecisions(plan, log)
    for index, (trial, step, value) in enumerate(_turns(plan, curves)):
        if index == resume_after:
            log = SweepLog(path, Metric("accuracy", maximize=True))
            decisions = SchedulerDecisions(plan, log)
        if trial not in log.trials:
            log.trial(trial, int(trial[1:]), {"optimizer.lr": 1e-4}, None)
            decisions.proposed(log.trials[trial])
        state = log.trials[trial]
        if state.status is not None:
            continue
        last = step == plan.rungs[-1]
        decision = decisions.decide(state, step, float(step), value, last)
        log.report(trial, step, float(step), {"accuracy": value}, decision)
        out.append((trial, step, decision))
        if last or not decision.go_on:
            log.end(trial, "finished" if last else "pruned", step)
            decisions.ended(state)
    return out


def _turns(plan: SweepPlan, curves: list[list[float]]) -> Iterator[tuple[str, int, float]]:
    for first in range(0, len(curves), 4):  # four at a time
        for rung, step in enumerate(plan.rungs):
            for i in range(first, min(first + 4, len(curves))):
                yield f"t{i}", step, curves[i][rung]


@pytest.mark.parametrize(
    "scheduler", [{"type": "asha"}, {"type": "median"}, {"type": "none"}, {"type": "asha", "reduction_factor": 2}]
)  # fmt: skip
def test_a_resumed_referee_gives_the_verdicts_of_the_first_one(
    job: Any, tmp_path: Path, scheduler: dict[str, Any]
) -> None:
    plan, rng = planned(job(num_trials=16, scheduler=scheduler)), random.Random(5)
    curves = [[rng.random() for _ in plan.rungs] for _ in range(16)]
    curves[3][0] = float("nan")
    whole = told(plan, tmp_path / "whole.jsonl", curves)
    for stop in (1, 7, 13, 22):
        assert told(plan, tmp_path / f"{stop}.jsonl", curves, stop) == whole
    stopped = [v for _, _, v in whole if not v.go_on]
    assert bool(stopped) is (scheduler["type"] != "none")


def test_asha_keeps_the_best_third_of_those_that_came(job: Any, tmp_path: Path) -> None:
    plan = planned(job(num_trials=9))
    rising = [[v / 10, v / 10, v / 10] for v in range(1, 9)]
    falling = list(reversed(rising))
    goes_on = [v.go_on for _, s, v in told(plan, tmp_path / "a", rising) if s == plan.rungs[0]]
    assert goes_on == [True] * 8, "each is the best so far"
    goes_on = [v.go_on for _, s, v in told(plan, tmp_path / "b", falling) if s == plan.rungs[0]]
    assert goes_on[0] is True
    assert not any(goes_on[1:])


def test_a_value_that_is_not_a_number_is_stopped_by_asha(job: Any, tmp_path: Path) -> None:
    plan = planned(job(num_trials=9))
    decisions = told(plan, tmp_path / "log", [[float("nan")] * 3])
    assert decisions == [("t0", 10, Decision(False, False))]


def test_the_last_step_is_never_a_stop(job: Any, tmp_path: Path) -> None:
    for name in ("asha", "median", "pbt", "none"):
        plan = planned(job(num_trials=8, scheduler={"type": name}))
        log = SweepLog(tmp_path / name, Metric("accuracy", maximize=True))
        decisions = SchedulerDecisions(plan, log)
        log.trial("a", 0, {}, None)
        decisions.proposed(log.trials["a"])
        assert decisions.decide(log.trials["a"], 90, 90.0, 0.0, True).go_on


def test_median_stopping_compares_with_running_means(job: Any, tmp_path: Path) -> None:
    plan = planned(job(num_trials=9, scheduler={"type": "median", "min_trials": 2}))
    log = SweepLog(tmp_path / "log", Metric("accuracy", maximize=True))
    decisions = SchedulerDecisions(plan, log)
    for index, values in enumerate([(0.4, 0.6), (0.6, 0.8)]):  # running means 0.5 and 0.7
        log.trial(f"t{index}", index, {}, None)
        for step, value in zip((10, 20), values, strict=True):
            log.report(f"t{index}", step, float(step), {"accuracy": value}, Decision(True, False))
    log.trial("new", 2, {}, None)
    new = log.trials["new"]
    assert decisions.decide(new, 5, 5.0, 0.0, False).go_on, (
        "before the first rung nobody is stopped"
    )
    assert decisions.decide(new, 20, 20.0, 0.61, False).go_on
    assert not decisions.decide(new, 20, 20.0, 0.59, False).go_on


def test_a_new_best_is_worth_a_checkpoint(job: Any, tmp_path: Path) -> None:
    plan = planned(job(num_trials=9))
    decisions = told(plan, tmp_path / "log", [[0.5, 0.6, 0.55], [0.4, 0.7, 0.9]])
    saved = {(trial, step) for trial, step, v in decisions if v.save}
    assert saved == {("t0", 10), ("t0", 30)}


def test_a_generation_ends_with_a_checkpoint_of_every_member(job: Any, tmp_path: Path) -> None:
    plan = planned(job(num_trials=8, scheduler={"type": "pbt", "generations": 3}))
    log = SweepLog(tmp_path / "log", Metric("accuracy", maximize=True))
    decisions = SchedulerDecisions(plan, log)
    log.trial("m", 0, {}, None)
    member = log.trials["m"]
    assert decisions.decide(member, 30, 30.0, 0.1, False) == Decision(False, True)
    assert decisions.decide(member, 40, 40.0, 0.1, False) == Decision(True, True)
    assert decisions.decide(member, 90, 90.0, 0.1, True) == Decision(True, True)


@pytest.mark.parametrize("ended", [(), (1,), (0, 1, 2, 3)])
def test_members_that_a_rule_of_the_job_ended_leave_the_population(
    ended: tuple[int, ...], job: Any, tmp_path: Path
) -> None:
    plan = planned(job(num_trials=4, scheduler={"type": "pbt", "generations": 3}))
    log = SweepLog(tmp_path / "log", Metric("accuracy", maximize=True))
    for m in range(4):
        log.trial(f"m{m:03d}g00", m, {"optimizer.lr": 1e-4}, None)
        step = 7 if m in ended else 30
        log.report(f"m{m:03d}g00", step, step, {"accuracy": 0.9 - m / 10}, Decision(True, True))
        log.end(f"m{m:03d}g00", "finished" if m in ended else "pruned", step)
    controller = SweepController(plan, log, Asked(), SweepFolder(tmp_path), lambda *_: plan.base)
    parents = []
    while (heir := controller._propose()) not in (None, NO_MORE):
        assert heir is not None
        log.trial(heir.id, heir.index, heir.values, heir.parent)
        parents.append(heir.parent)
    controller.close()
    if len(ended) == 4:
        assert parents == []
        assert controller.stopping is None, "that is no failure"
    else:
        assert len(parents) == 4
        assert all(step == 30 for _, step in parents), "none goes on from one that has ended"


# --- the controller


class Asked:
    """A broker that only notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *words: self.calls.append((name, *words)))


@pytest.fixture
def directed(job: Any, tmp_path: Path) -> Iterator[tuple[SweepController, Asked]]:
    """A controller of one trial, and the broker that it speaks to."""
    plan, broker = planned(job(num_trials=1)), Asked()
    log = SweepLog(tmp_path / "log.jsonl", Metric("accuracy", maximize=True))
    log.trial("t00000", 0, {"optimizer.lr": 1e-4}, None)
    controller = SweepController(
        plan, log, broker, SweepFolder(tmp_path / "sweep"), lambda *_: plan.base
    )
    yield controller, broker
    controller.close()


def test_a_trial_whose_follower_is_lost_is_offered_again_but_not_for_ever(
    directed: tuple[SweepController, Asked],
) -> None:
    controller, broker = directed
    controller.live.add("t00000")
    controller._unfinished.clear()
    assert controller.next_trial() is None, "nothing to run, but its follower may be lost yet"
    for _ in range(MOST_LOST):
        controller.proxy_lost("t00000")
        assert controller.next_trial() is controller.log.trials["t00000"]
        assert not controller.broken
    controller.proxy_lost("t00000")
    assert controller.broken
    assert ("give_up", "t00000") in broker.calls
    assert controller.next_trial() is NO_MORE


def test_a_report_that_comes_twice_is_judged_once_and_answered_twice(
    directed: tuple[SweepController, Asked],
) -> None:
    controller, broker = directed
    controller.per_step["t00000"] = 1.0
    said = {"trial": "t00000", "step": 10, "metrics": {"accuracy": 0.5}, "last": False}
    controller.reported(said)
    controller.reported(said)
    assert [kind for kind, _, _ in controller.log.order] == ["trial", "report"]
    first, second = (call for call in broker.calls if call[0] == "decision")
    assert first == second


def test_a_folder_of_another_sweep_is_refused_before_anything_is_written_into_it(
    job: Any, tmp_path: Path
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    write_json(folder.plan, planned(job(num_trials=3)).model_dump(mode="json"))
    with _locked_sweep(job(num_trials=5), folder, fresh=False):
        pass
    with (
        pytest.raises(RunExistsError, match=r"sweep\.space"),
        _locked_sweep(job(space={"optimizer.lr": [1e-5, 1e-4]}), folder, fresh=False),
    ):
        pytest.fail("it was let in")
    assert not folder.events.exists()
