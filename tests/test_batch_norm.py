"""Batch norm with held statistics: rows stay apart, workers and micro-batches change nothing, buffers travel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from compat.run import one_process
from group import losses, plan_of, run_trials
from one_process import planned
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.plan import Plan
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.spec import JobSpec
from orchestrator.train.checkpoint import newest_valid
from orchestrator.train.export import checkpoint_state, export_run
from orchestrator.train.trial import Trial

SIDE, LABELS = 32, ("bad", "good")
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "layer_type": "basic", **STAGES},
    "regnet": {"embedding_size": 8, "groups_width": 8, **STAGES},
    "mobilenet_v1": {"image_size": SIDE, "depth_multiplier": 0.125, "min_depth": 4},
    "mobilenet_v2": {"image_size": SIDE, "depth_multiplier": 0.25},
    "efficientnet": {
        "image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320,
        "in_channels": [16, 24], "out_channels": [24, 32], "kernel_sizes": [3, 3], "strides": [1, 2],
        "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [],
    },
    "mobilevit": {
        "image_size": SIDE, "hidden_sizes": [16, 16, 16], "num_attention_heads": 2,
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
    },
    "levit": {
        "image_size": SIDE, "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "depths": [1, 1],
        "key_dim": [8, 8], "drop_path_rate": 0, "mlp_ratio": [2, 2], "attention_ratio": [2, 2],
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], [""]],
    },
}  # fmt: skip


def pretrained(kind: str, root: Path) -> Path:
    """A tiny checkpoint whose batch norms have statistics of their own."""
    folder = root / kind
    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    config.architectures = []  # of several classes with one head, the auto class then takes the first
    model = transformers.AutoModelForImageClassification.from_config(config)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    return folder


def job(source: Path | None, folder: Path, rows: int = 21, **fields: Any) -> JobSpec:
    """Noise around a level that follows the label; `rows` is no multiple of the batch."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i in range(rows):
        level = 150 if i % 2 else 50
        noise = np.random.default_rng(i).integers(0, 100, (SIDE, SIDE, 3))
        path = folder / f"{i}.png"
        Image.fromarray((level + noise).astype(np.uint8)).save(path)
        written.append({"image": str(path), "label": LABELS[i % 2]})
    data = tiny.write_jsonl(folder / "rows.jsonl", written)
    settings: dict[str, Any] = {
        "task": {"type": "image_classification", "size_pixels": SIDE, "labels": list(LABELS)},
        "batch": {"global_batch_size": 8},
        "optimizer": {"type": "sgd", "momentum": 0.9, "lr": 0.05},
        "schedule": {"type": "constant"},
        "stop": {"max_steps": 4},
        "resources": {"num_workers": 1},
        "zero": {"stage": 2},
        "data": {"eval": str(data)},
        "evaluation": {"every_steps": "end"},
        **fields,
    }
    return tiny.job(source or folder, data, folder, **settings)


def batch_of(task: Any, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    encoded: list[Any] = [
        {"pixels": rng.integers(0, 255, 3 * SIDE * SIDE).astype(np.uint8), "label": i % 2}
        for i in range(rows)
    ]
    return task.collate(encoded, np.ones(rows), 0)


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_row_is_computed_alike_alone_and_among_others_while_training(
    tmp_path: Path, kind: str
) -> None:
    spec = job(pretrained(kind, tmp_path), tmp_path / "job")
    model: Any = build_model(spec, LABELS)
    before = statistics(model)
    model.eval()
    model.train()  # as the engine and each evaluation do
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    task, together = spec.task, batch_of(spec.task, 5)
    alone = {name: tensor[:1] for name, tensor in together.items()}
    with torch.no_grad():
        one, five = (task.measure(model, batch)["loss"] for batch in (alone, together))
    assert five[0] == pytest.approx(one[0], rel=1e-5)
    task.loss_sum(model, together).backward()
    after = statistics(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert all(norm.weight.grad is not None and norm.bias.grad is not None for norm in norms)
    assert any(float(norm.weight.grad.abs().sum()) > 0 for norm in norms)
    assert model.training


def test_dropout_and_layers_without_statistics_follow_the_mode_of_the_model(tmp_path: Path) -> None:
    model: Any = build_model(job(pretrained("mobilenet_v1", tmp_path), tmp_path / "job"), LABELS)
    model.train()
    assert all(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))


def test_new_weights_need_a_choice(tmp_path: Path) -> None:
    fields = {"model_type": "resnet", **CONFIGS["resnet"]}
    undecided = job(None, tmp_path, model={"pretrained": None, "config": fields})
    with pytest.raises(OrchestratorError, match="set model"):
        build_model(undecided, LABELS)
    model = {"pretrained": None, "config": fields, "batch_norm": "frozen"}
    built: Any = build_model(job(None, tmp_path, model=model), LABELS)
    norms = [m for m in built.train().modules() if isinstance(m, _BatchNorm)]
    assert all(not m.training and float(m.running_mean.abs().sum()) == 0 for m in norms)


def run(plan: Plan) -> RunFolder:
    folder = RunFolder(Path(plan.run_dir))
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.plan, plan.model_dump(mode="json"))
    trial = Trial(plan, folder)
    trial.train()
    trial.close()
    return folder


def last_state(folder: RunFolder) -> dict[str, torch.Tensor]:
    found = newest_valid(folder.checkpoints, lambda _: None)
    assert found is not None
    return checkpoint_state(found)


def test_resume_is_bit_identical_and_statistics_reach_the_export(tmp_path: Path) -> None:
    source = pretrained("resnet", tmp_path)
    with one_process(tmp_path):
        whole = planned(job(source, tmp_path / "whole", name="whole"))
        straight = last_state(run(whole))
        half = job(source, tmp_path / "parts", name="parts", stop={"max_steps": 2})
        run(planned(half))
        resumed = run(planned(job(source, tmp_path / "parts", name="parts")))
        parts = last_state(resumed)
        export_run(whole, RunFolder(Path(whole.run_dir)), tmp_path / "export", {"best": None})
    assert straight.keys() == parts.keys()
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
    auto = transformers.AutoModelForImageClassification
    base, exported = (auto.from_pretrained(path) for path in (source, tmp_path / "export"))
    theirs = statistics(base)
    assert any(name.endswith("running_var") for name in theirs)
    assert all(torch.equal(theirs[n], buffer) for n, buffer in statistics(exported).items())
    moved = dict(exported.named_parameters())
    assert all(torch.equal(moved[n], straight[n]) for n in moved)


def equal_losses(found: Sequence[float], expected: Sequence[float]) -> bool:
    return found == pytest.approx(expected, rel=1e-4)


def test_workers_and_micro_batches_change_nothing_but_rounding(ray: Any, tmp_path: Path) -> None:
    source = pretrained("resnet", tmp_path)
    cuts = {"one": (1, 8), "small": (1, 3), "two": (2, 2)}
    plans = {
        name: plan_of(
            job(
                source,
                tmp_path / name,
                name=name,
                stop={"max_steps": 5},
                batch={"global_batch_size": 8, "micro_batch_size": micro},
                resources={"num_workers": workers},
            )
        )
        for name, (workers, micro) in cuts.items()
    }
    run_trials([plans["one"], plans["small"]])
    run_trials([plans["two"]])
    found = {name: losses(plan) for name, plan in plans.items()}
    assert len(found["one"]) == 5
    assert equal_losses(found["small"], found["one"])
    assert equal_losses(found["two"], found["one"])
