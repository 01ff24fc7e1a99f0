"""Another number of workers takes over: same rows, same mathematics, no state lost."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from group import losses, named, plan_of, run_trials

from orchestrator.errors import RunExistsError
from orchestrator.launch.run_lock import at_saved_stage, locked
from orchestrator.plan import Plan
from orchestrator.plan.plan import at_workers
from orchestrator.report.records import read_records
from orchestrator.run_folder import RunFolder
from orchestrator.spec import JobSpec
from orchestrator.spec.job import ResourcesSpec
from orchestrator.train.checkpoint import newest_valid
from orchestrator.train.engine import load_random_state
from orchestrator.train.export import checkpoint_state

STEPS = 16
CHAIN = (2, 1, 2, 3)
"""Workers of the four quarters of a run: 2→1, 1→2, 2→3."""
KINDS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": {"stage": 1}},
    "zero2": {  # some ranks hold nothing of a group as small as this
        "zero": {"stage": 2},
        "tuning": {"type": "lora"},
        "optimizer": {"type": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.5},
    },
    "zero3": {"zero": {"stage": 3}, "tuning": {"type": "full", "freeze": ["*.layer.0.*"]}},
}


def job(models: tiny.Tiny, folder: Path, name: str, **fields: Any) -> JobSpec:
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(203))
    settings: dict[str, Any] = {
        "name": name,
        "batch": {"global_batch_size": 8},
        "optimizer": {"lr": 2e-3, "weight_decay": 2.0},  # a wrong group's decay shows at once
        "schedule": {"type": "constant", "warmup_steps": 3},
        "stop": {"max_steps": STEPS},
        "resources": {"num_workers": 2},
        "fault_tolerance": {"health_timeout_s": 0.5},
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


@pytest.fixture(scope="module")
def runs(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Plan]]:
    """Finished trials by kind: (one that changed its number of workers, one that did not).

    Four worker groups, of the sizes in CHAIN, each train a quarter of every changing run. The fixed
    ones are asked to hand over at their first step.
    """
    folder = tmp_path_factory.mktemp("moves")
    plans = {kind: plan_of(job(models, folder, kind, **fields)) for kind, fields in KINDS.items()}
    fixed = {kind: named(plan, f"{kind}-fixed") for kind, plan in plans.items()}
    for plan in fixed.values():
        RunFolder(Path(plan.run_dir)).handover_request.touch()

    def quarter(kind: str, number: int) -> Plan:
        plan = named(plans[kind], kind, total_steps=STEPS * (number + 1) // len(CHAIN))
        return at_workers(plan, CHAIN[number])

    results = run_trials([*fixed.values()] + [quarter(kind, 0) for kind in KINDS])
    for number in range(1, len(CHAIN)):
        results += run_trials([quarter(kind, number) for kind in KINDS])
    assert {r["status"] for r in results} == {"finished"}, results
    return {kind: (plans[kind], fixed[kind]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_follows_the_fixed_size_run(kind: str, runs: dict[str, tuple[Plan, Plan]]) -> None:
    moved, fixed = runs[kind]
    got, want = losses(moved), losses(fixed)
    assert len(got) == len(want) == STEPS
    np.testing.assert_allclose(got, want, rtol=2e-5)
    one, other = (last_weights(plan) for plan in (moved, fixed))
    assert one.keys() == other.keys()
    for name in one:  # Adam makes much of rounding where gradients are nearly zero
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4, msg=name)


def last_weights(plan: Plan) -> dict[str, torch.Tensor]:
    newest = newest_valid(RunFolder(Path(plan.run_dir)).checkpoints, print)
    assert newest is not None
    assert newest.step == STEPS
    return checkpoint_state(newest)


def test_asked_to_hand_over_workers_commit_and_go_on_where_nobody_takes_over(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    for _, fixed in runs.values():
        folder = RunFolder(Path(fixed.run_dir))
        events = [(e["kind"], e.get("step")) for e in read_records(folder.events)]
        assert events.index(("commit", 1)) < events.index(("handover", 1))
        assert not folder.handover_request.exists()


def test_a_rank_for_which_no_random_state_was_saved_is_seeded_from_seed_step_and_rank(
    tmp_path: Path,
) -> None:
    def draw(rank: int, seed: int, step: int) -> tuple[float, float, float]:
        load_random_state(tmp_path, rank, seed, step)
        return (float(torch.rand(())), float(np.random.rand()), random.random())

    assert draw(1, 7, 100) == draw(1, 7, 100)
    others = {draw(*key) for key in ((1, 7, 100), (2, 7, 100), (1, 8, 100), (1, 7, 101))}
    assert len(others) == 4


@pytest.mark.parametrize("commits", [True, False])
def test_a_change_of_size_waits_for_the_commit_but_not_for_ever(
    commits: bool, tmp_path: Path
) -> None:
    from ray.train.v2._internal.execution.controller.state import ResizingState
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

    from orchestrator.launch.elastic import FollowCluster

    folder = RunFolder(tmp_path)
    asked = threading.Event()

    def work() -> None:
        while not folder.handover_request.exists():
            time.sleep(0.01)
        asked.set()
        if commits:
            time.sleep(0.2)
            folder.handover_request.unlink()

    threading.Thread(target=work, daemon=True).start()
    began = time.monotonic()
    follow = FollowCluster(folder, patience_s=60 if commits else 0.5)
    growing = ResizingState(ResizeDecision(num_workers=2, resources_per_worker={}))
    follow.after_controller_state_update(None, growing)
    assert asked.is_set()
    assert (0.2 if commits else 0.5) <= time.monotonic() - began < 50
    assert not folder.handover_request.exists()
    (event,) = read_records(folder.events)
    assert (event["kind"], event["workers"]) == ("resize", 2)


def made(plan: Plan, **changes: Any) -> Plan:
    """The plan with other settings, locked and released."""
    spec = plan.spec.model_copy(update=changes)
    plan = plan.model_copy(update={"spec": spec})
    with locked(plan, fresh=False):
        return plan


@pytest.fixture
def plan(ray: Any, models: tiny.Tiny, tmp_path: Path) -> Plan:
    return plan_of(job(models, tmp_path, "mine", zero={"stage": "auto"}))


def test_a_run_goes_on_with_another_number_of_workers(plan: Plan) -> None:
    one = at_workers(made(plan), 1)
    assert (one.rows_per_worker, one.global_batch_size) == (8, 8)
    assert one.deepspeed["train_batch_size"] == plan.deepspeed["train_batch_size"]
    assert made(one, resources=ResourcesSpec(num_workers=1)).num_workers == 1


def test_the_same_number_of_workers_keeps_its_micro_batch(plan: Plan) -> None:
    made(plan)
    with pytest.raises(RunExistsError, match="micro_batch_size: 4 → 2"):
        made(plan.model_copy(update={"micro_batch_size": 2}))


def test_auto_keeps_the_zero_stage_of_the_checkpoints(plan: Plan) -> None:
    made(at_workers(plan, 2, stage=2))
    kept = at_saved_stage(at_workers(plan, 1))
    assert (plan.stage, kept.stage, kept.num_workers) == (0, 2, 1)
    assert kept.deepspeed["zero_optimization"]["stage"] == 2
    assert "checkpoints" in kept.reasons["stage"]
    assert made(kept) == kept
