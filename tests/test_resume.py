"""Every knob survives an interruption: real workers, stopped half-way, end bit for bit the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from group import named, plan_of, run_trials

from orchestrator.plan import Plan
from orchestrator.run_folder import RunFolder
from orchestrator.train.checkpoint import Committed, committed

STEPS = 6
KNOBS: dict[str, dict[str, Any]] = {
    "adam-zero1": {"optimizer": {"type": "adam", "lr": 1e-3}, "zero": {"stage": 1}},
    "rmsprop-zero2": {
        "optimizer": {"type": "rmsprop", "lr": 1e-3, "momentum": 0.9, "centered": True},
        "zero": {"stage": 2},
    },
    "lion-zero3": {"optimizer": {"type": "lion", "lr": 1e-3}, "zero": {"stage": 3}},
    "nesterov-zero2": {
        "optimizer": {"type": "sgd", "nesterov": True, "layer_decay": 0.5, "head_lr": 0.1},
        "zero": {"stage": 2},
    },
    "adafactor": {"optimizer": {"type": "adafactor"}},
}


def plans(models: tiny.Tiny, folder: Path) -> dict[str, Plan]:
    """A short job for each knob, with a checkpoint half-way."""
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labelled(61))
    held_out = tiny.write_jsonl(folder / "eval.jsonl", tiny.labelled(9, seed=1))
    common: dict[str, Any] = {
        "batch": {"global_rows": 8},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": STEPS // 2, "keep": 3},
        "evaluation": {"every_steps": 1},
        "resources": {"num_workers": 2},
    }
    made = {}
    for name, fields in KNOBS.items():
        data = {"eval": str(held_out), **fields.get("data", {})}
        spec = tiny.job(models.bert, train, folder, name=name, **{**common, **fields, "data": data})
        made[name] = named(plan_of(spec), name)
    return made


def at(plan: Plan, step: int) -> Committed:
    """The plan's checkpoint of a step."""
    found = committed(RunFolder(Path(plan.run_dir)).checkpoints)
    return next(c for c in found if c.step == step)


def interrupted(plan: Plan) -> Plan:
    """A run folder that holds what was there when the run stood half-way."""
    half = named(plan, f"{Path(plan.run_dir).name}-interrupted")
    source = at(plan, STEPS // 2).folder
    shutil.copytree(source, RunFolder(Path(half.run_dir)).checkpoints / source.name)
    return half


@pytest.fixture(scope="module")
def runs(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Plan]]:
    """Each knob's run, once straight through and once from its middle on, in other workers."""
    straight = plans(models, tmp_path_factory.mktemp("resume"))
    first = run_trials(list(straight.values()))
    halves = {name: interrupted(plan) for name, plan in straight.items()}
    second = run_trials(list(halves.values()))
    assert [r["status"] for r in first + second] == ["finished"] * 2 * len(straight)
    return {name: (straight[name], halves[name]) for name in straight}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    straight, resumed = (at(plan, STEPS) for plan in runs[knob])
    files = sorted(p.relative_to(straight.folder) for p in straight.folder.rglob("*.pt"))
    assert len(files) >= 3
    for file in files:
        one, other = (torch.load(c.folder / file, weights_only=False) for c in (straight, resumed))
        assert differences(one, other) == [], file
    assert without_times(straight) == without_times(resumed)


def without_times(checkpoint: Committed) -> Any:
    """The progress in a checkpoint, but for what a clock said."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: pruned(v) for k, v in value.items() if not k.endswith("_s")}
        return [pruned(v) for v in value] if isinstance(value, list) else value

    return pruned(checkpoint.facts["progress"])


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two pickled trees differ in a tensor or a number; folder names may."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [d for k in one for d in differences(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{path}/{i}")]
    return [path] if isinstance(one, int | float) and one != other else []
