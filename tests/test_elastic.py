"""Another number of workers takes over: same rows, same mathematics, no state lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from group import losses, named, plan_of, run_trials

from orchestrator.plan import Plan
from orchestrator.plan.plan import at_workers
from orchestrator.spec import JobSpec

STEPS = 16
CHAIN = (2, 1, 2, 3)
"""Workers of the four quarters of a run: 2→1, 1→2, 2→3."""
MOMENTUM = {"type": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.5}
CHAINED: dict[str, dict[str, Any]] = {f"zero{stage}": {"zero": {"stage": stage}} for stage in (1, 2, 3)}  # fmt: skip
SHRUNK: dict[str, dict[str, Any]] = {  # some ranks hold nothing of a group this small
    "lora1": {"tuning": {"type": "lora"}, "zero": {"stage": 1}, "optimizer": MOMENTUM},
    "lora3": {"tuning": {"type": "lora"}, "zero": {"stage": 3}},
}


def job(models: tiny.Tiny, folder: Path, name: str, **fields: Any) -> JobSpec:
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labelled(203))
    settings: dict[str, Any] = {
        "name": name,
        "batch": {"global_rows": 8},
        "optimizer": {"lr": 2e-3, "weight_decay": 2.0},  # a wrong group's decay shows at once
        "schedule": {"type": "constant", "warmup_steps": 3},
        "stop": {"max_steps": STEPS},
        "resources": {"num_workers": 2},
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


@pytest.fixture(scope="module")
def runs(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Plan]]:
    """Finished trials by kind: (one that changed its number of workers, one that did not).

    Four worker groups, of the sizes in CHAIN, each train a quarter of every chained run.
    """
    folder = tmp_path_factory.mktemp("moves")
    kinds = {**CHAINED, **SHRUNK}
    plans = {kind: plan_of(job(models, folder, kind, **fields)) for kind, fields in kinds.items()}
    fixed = {kind: named(plans[kind], f"{kind}-fixed") for kind in ("zero2", *SHRUNK)}

    def quarter(kind: str, number: int) -> Plan:
        plan = named(plans[kind], kind, total_steps=STEPS * (number + 1) // len(CHAIN))
        return at_workers(plan, CHAIN[number])

    results = []
    for number in range(len(CHAIN)):
        group = [quarter(kind, number) for kind in CHAINED]
        if number == 0:
            group += [quarter(kind, 0) for kind in SHRUNK] + list(fixed.values())
        if number == 1:
            group += [at_workers(plans[kind], 1) for kind in SHRUNK]
        results += run_trials(group)
    assert {r["status"] for r in results} == {"finished"}, results
    return {kind: (plans[kind], fixed.get(kind, fixed["zero2"])) for kind in kinds}


@pytest.mark.parametrize("kind", [*CHAINED, *SHRUNK])
def test_the_loss_follows_the_fixed_size_run(kind: str, runs: dict[str, tuple[Plan, Plan]]) -> None:
    moved, fixed = runs[kind]
    got, want = losses(moved), losses(fixed)
    assert len(got) == len(want) == STEPS
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert max(want[-4:]) < min(want[:2])  # it learns, so agreement says something
