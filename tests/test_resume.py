"""Every knob survives an interruption: real workers, stopped half-way, end bit for bit the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from group import losses, named, plan_of, probe, run_trials
from peft import PeftModel
from test_exactness import plain_loop
from transformers import AutoModelForSequenceClassification

from orchestrator.data.manifest import read_manifest
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.launch.run import _is_over
from orchestrator.model.build import build_model
from orchestrator.model.parts import PROJECTION, distances
from orchestrator.plan import Plan
from orchestrator.report.html import write_report
from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json, write_json
from orchestrator.train.checkpoint import Committed, committed
from orchestrator.train.compare import compare_with_teacher
from orchestrator.train.engine import TAG
from orchestrator.train.export import (
    checkpoint_state,
    export_run,
    load_exported,
    load_weights,
)

STEPS = 6
KNOBS: dict[str, dict[str, Any]] = {
    "rmsprop-dropout-zero2": {
        "optimizer": {"type": "rmsprop", "lr": 1e-3, "momentum": 0.9, "centered": True},
        "model": {"dropout": 0.1},
        "zero": {"stage": 2},
    },
    "adafactor": {"optimizer": {"type": "adafactor"}},
    "muon-ema": {
        "optimizer": {"type": "muon", "lr": 1e-3, "layer_decay": 0.5},
        "regularization": {"averaging": {"type": "ema", "decay": 0.7}},
        "model": {"dropout": 0.1},
    },
    "muon-bf16": {"optimizer": {"type": "muon", "lr": 1e-3}, "precision": "bf16"},
    **{
        f"ema-zero{stage}": {
            "regularization": {"averaging": {"type": "ema", "decay": 0.7}},
            "optimizer": {"lr": 1e-3},
            "zero": {"stage": stage},
        }
        for stage in (0, 2, 3)
    },
    "adam-swa-bf16-zero2": {
        "zero": {"stage": 2},
        "optimizer": {"type": "adam", "lr": 1e-3},
        "regularization": {"averaging": {"type": "swa", "start_ratio": 0.2, "every_steps": 2}},
        "precision": "bf16",
    },
    "nesterov-noise-zero1": {
        "optimizer": {"type": "sgd", "nesterov": True, "layer_decay": 0.5, "head_lr": 0.1},
        "model": {"dropout": 0.1},
        "regularization": {
            "l1": 1e-4, "label_smoothing": 0.1, "class_weights": "balanced", "neftune_alpha": 5,
            "r_drop_alpha": 1, "token_dropout": 0.2,
        },
        "zero": {"stage": 1},
    },
    **{
        f"distil-zero{stage}": {
            "distillation": {"alpha": 0.7, "hidden": {"layers": {1: 2}}},
            "model": {"keep_layers": [1], "dropout": 0.1},
            "optimizer": {"lr": 1e-3},
            "zero": {"stage": stage},
        }
        for stage in (2, 3)
    },
    "lion-mixup-plateau-zero3": {
        "optimizer": {"type": "lion", "lr": 0.01},
        "regularization": {"mixup_alpha": 0.4},
        "schedule": {"type": "plateau", "patience": 1, "metric": "loss"},
        "zero": {"stage": 3},
    },
    **{
        name: {"tuning": tuning, "optimizer": {"lr": 0.02}, "evaluation": {"every_steps": "end"}, **rest}
        for name, tuning, rest in (
            ("lora-zero3", {"type": "lora", "merge_on_export": False}, {"zero": {"stage": 3}}),
            ("dora-zero3", {"type": "lora", "use_dora": True}, {"zero": {"stage": 3}}),
            ("ia3-zero2", {"type": "ia3"}, {"zero": {"stage": 2}}),
            ("prompt-zero3", {"type": "prompt", "num_virtual_tokens": 3}, {"zero": {"stage": 3}}),
            ("prefix-zero3", {"type": "prefix", "num_virtual_tokens": 3}, {"zero": {"stage": 3}}),
        )
    },
    "lora-ema-bf16-zero2": {
        "tuning": {"type": "lora"},
        "optimizer": {"lr": 0.02},
        "regularization": {"averaging": {"type": "ema", "decay": 0.7}},
        "precision": "bf16",
        "zero": {"stage": 2},
    },
    **{
        f"unfreezing-zero{stage}": {
            "tuning": {"unfreeze_every_steps": 2},
            "optimizer": {"lr": 0.02, "weight_decay": 0.1},
            "schedule": {"type": "constant"},
            "gradient_clipping": 0.05,
            "evaluation": {"every_steps": "end"},
            "zero": {"stage": stage},
        }
        for stage in (2, 3)
    },
}  # fmt: skip
ADAPTERS = [n for n, k in KNOBS.items() if "type" in k.get("tuning", {}) and "precision" not in k]


def plans(models: tiny.Tiny, folder: Path) -> dict[str, Plan]:
    """A short job for each knob, with a checkpoint half-way."""
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(61))
    held_out = tiny.write_jsonl(folder / "eval.jsonl", tiny.labeled(9, seed=1))
    common: dict[str, Any] = {
        "batch": {"global_batch_size": 8},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": STEPS // 2, "num_to_keep": 3},
        "evaluation": {"every_steps": 1},
        "resources": {"num_workers": 2},
    }
    made = {}
    for name, fields in KNOBS.items():
        data = {"eval": str(held_out), **fields.get("data", {})}
        if "distillation" in fields:
            fields = {
                **fields,
                "distillation": {"teacher": str(models.bert), **fields["distillation"]},
            }
        spec = tiny.job(models.bert, train, folder, name=name, **{**common, **fields, "data": data})
        made[name] = named(plan_of(spec), name)
    return made


def at(plan: Plan, step: int) -> Committed:
    """The plan's checkpoint of a step."""
    found = committed(RunFolder(Path(plan.run_dir)).checkpoints)
    return next(c for c in found if c.step == step)


def interrupted(plan: Plan, suffix: str = "interrupted") -> Plan:
    """A run folder that holds what was there when the run stood half-way."""
    half = named(plan, f"{Path(plan.run_dir).name}-{suffix}")
    source = at(plan, STEPS // 2).folder
    shutil.copytree(source, RunFolder(Path(half.run_dir)).checkpoints / source.name)
    return half


@pytest.fixture(scope="module")
def runs(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Plan]]:
    """Each knob's run, once straight through and once from its middle on, in other workers."""
    straight = plans(models, tmp_path_factory.mktemp("resume"))
    early = ended_early(straight["adafactor"])
    timed = ended_by_time(straight["unfreezing-zero2"])
    first = run_trials([*straight.values(), early, timed])
    halves = {name: interrupted(plan) for name, plan in straight.items()}
    again = named(early, "early")  # the same folder: what a launch after a crash at the end finds
    other = with_other_decay(interrupted(straight["ema-zero2"], "other"))
    more = with_more_time(timed)
    second = run_trials([*halves.values(), again, other, more])
    assert [r["status"] for r in first + second] == ["finished"] * (len(first) + len(second))
    pairs = {name: (straight[name], halves[name]) for name in straight}
    return {
        **pairs,
        "early": (early, again),
        "other": (straight["ema-zero2"], other),
        "timed": (timed, more),
    }


def with_other_decay(plan: Plan) -> Plan:
    """The plan with a weight decay that its checkpoint was not written with."""
    optimizer = plan.spec.optimizer.model_copy(update={"weight_decay": 0.25})
    return plan.model_copy(update={"spec": plan.spec.model_copy(update={"optimizer": optimizer})})


def ended_early(plan: Plan) -> Plan:
    """The plan with a target that its first evaluation reaches."""
    stop = plan.spec.stop.model_copy(update={"target": 0.0})
    return named(plan, "early", spec=plan.spec.model_copy(update={"stop": stop}))


def ended_by_time(plan: Plan) -> Plan:
    """The plan with less time than its first step takes."""
    stop = plan.spec.stop.model_copy(update={"max_time_s": 1e-3})
    return named(plan, "timed", spec=plan.spec.model_copy(update={"stop": stop}))


def with_more_time(plan: Plan) -> Plan:
    """A copy of the plan's run folder, in which the limit is a day."""
    stop = plan.spec.stop.model_copy(update={"max_time_s": 86400.0})
    more = named(plan, "timed-more", spec=plan.spec.model_copy(update={"stop": stop}))
    shutil.copytree(
        RunFolder(Path(plan.run_dir)).checkpoints, RunFolder(Path(more.run_dir)).checkpoints
    )
    return more


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


@pytest.mark.parametrize("knob", ADAPTERS)
def test_a_checkpoint_of_an_adapter_holds_all_of_it_and_nothing_of_the_base(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan, _ = runs[knob]
    begun: Any = build_model(plan.spec, plan.labels)
    wanted = {name: p for name, p in begun.named_parameters() if p.requires_grad}
    found = checkpoint_state(at(plan, STEPS))
    assert found.keys() == wanted.keys()
    moved = {n for n in wanted if not torch.equal(found[n].float(), wanted[n].detach())}
    assert moved == wanted.keys()


@pytest.mark.parametrize(
    "knob", [k for k in KNOBS if "zero" in k and "ema" not in k and "swa" not in k]
)
def test_whole_weights_are_those_that_deepspeed_puts_together(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan, _ = runs[knob]
    assert plan.stage > 0
    checkpoint = at(plan, STEPS)
    wanted = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.folder), tag=TAG, exclude_frozen_parameters=plan.model.frozen > 0
    )
    assert differences(checkpoint_state(checkpoint), wanted) == []


@pytest.mark.parametrize("knob", ADAPTERS)
def test_an_export_of_an_adapter_gives_the_engines_logits(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan, _ = runs[knob]
    folder = RunFolder(Path(plan.run_dir))
    export_run(plan, folder, folder.export, {"best": {"step": STEPS}})
    apart = (folder.export / "adapter_config.json").exists()
    assert apart == (not getattr(plan.spec.tuning, "merge_on_export", False))
    base: Any = AutoModelForSequenceClassification.from_pretrained(
        plan.spec.model.pretrained if apart else folder.export
    )
    model = PeftModel.from_pretrained(base, str(folder.export)) if apart else base
    expected = torch.load(folder.root / "logits.pt")
    for loaded in (model, load_exported(folder.export)[1]):
        torch.testing.assert_close(probe(loaded, plan), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_that_wait_under_zero_are_as_if_they_needed_no_gradient(
    stage: int, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan, resumed = runs[f"unfreezing-zero{stage}"]
    np.testing.assert_allclose(losses(plan), unfreezing_loop(plan), rtol=1e-4)
    assert losses(resumed) == losses(plan)[STEPS // 2 :]


def unfreezing_loop(plan: Plan) -> list[float]:
    """Loss per step of a plain torch loop in which layers get `requires_grad` one by one."""
    depth: dict[str, int] = {}

    def before(model: Any, step: int) -> None:
        named = dict(model.named_parameters())
        depth.update(depth or distances(list(named), ""))
        for name, parameter in named.items():
            parameter.requires_grad_(depth[name] <= step // 2)

    return plain_loop(plan, before)


@pytest.mark.parametrize("knob", ["ema-zero0", "ema-zero2", "ema-zero3"])
def test_evaluation_and_export_use_the_averaged_weights(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan, reference = runs[knob][0], runs["ema-zero0"][0]
    checkpoint, other = at(plan, STEPS), at(reference, STEPS)
    averages, same = (torch.load(c.folder / "averaged.pt") for c in (checkpoint, other))
    for name, value in averages.items():
        torch.testing.assert_close(value, same[name], rtol=1e-3, atol=2e-6)
    exported, raw = load_weights(plan, checkpoint), load_weights(plan, without_averages(checkpoint))
    evaluated = checkpoint.facts["progress"]["last_eval"]["loss"]
    assert evaluation_loss(plan, exported) == pytest.approx(evaluated, rel=1e-5)
    assert evaluation_loss(plan, raw) != pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("knob", ["distil-zero2", "distil-zero3"])
def test_a_student_is_exported_alone_and_compared_with_its_teacher(
    knob: str, runs: dict[str, tuple[Plan, Plan]]
) -> None:
    plan = runs[knob][0]
    checkpoint, folder = at(plan, STEPS), RunFolder(Path(plan.run_dir))
    own, beside = plan.model.parameters, plan.model.projection
    kept = checkpoint_state(checkpoint)
    projected = {n: t for n, t in kept.items() if n.startswith(PROJECTION)}
    assert sum(t.numel() for t in projected.values()) == beside == 33 * 32
    assert projected[f"{PROJECTION}.0.bias"].abs().max() > 0, "it began at 0"
    exported = export_run(plan, folder, folder.export, {"best": {"step": STEPS}})
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert loaded.config.num_hidden_layers == 1
    assert sum(p.numel() for p in loaded.parameters()) == own
    evaluated = checkpoint.facts["progress"]["last_eval"]
    assert evaluation_loss(plan, loaded) == pytest.approx(evaluated["loss"], rel=1e-5)
    found = compare_with_teacher(plan, exported)
    assert found["student"]["metrics"]["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert found["teacher"]["parameters"] > found["student"]["parameters"] == own
    assert found["rows"] == 9
    write_json(folder.teacher, found)
    page = write_report(folder).read_text()
    assert "Teacher and student" in page
    assert f"{own:,}" in page


def without_averages(checkpoint: Committed) -> Committed:
    """A copy of a checkpoint that holds the weights as they were trained."""
    bare = checkpoint.folder.parent.parent / "bare" / checkpoint.folder.name
    shutil.copytree(checkpoint.folder, bare, dirs_exist_ok=True)
    (bare / "averaged.pt").unlink()
    return Committed(bare, checkpoint.facts)


def evaluation_loss(plan: Plan, model: Any) -> float:
    """Mean loss over the plan's evaluation rows."""
    assert plan.eval_data is not None
    manifest = read_manifest(Path(plan.eval_data.folder))
    assert manifest is not None
    rows = unpack_rows(open_shards(plan.eval_data.folder, manifest).take(np.arange(manifest.rows)))
    batch = plan.spec.task.collate(rows, np.ones(len(rows)), plan.pad_token_id)
    with torch.no_grad():
        return float(plan.spec.task.loss_sum(model.eval(), batch)) / len(rows)


def test_a_run_that_reached_its_target_has_ended_and_goes_no_further_when_launched_again(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    folder = RunFolder(Path(runs["early"][0].run_dir))
    outcome = read_json(folder.outcome)
    assert outcome is not None
    assert outcome["step"] == 1
    assert "stopped early at step 1 of 6" in outcome["message"]
    assert [r["step"] for r in read_records(folder.steps)] == [1], "no step was done twice"
    assert [c.step for c in committed(folder.checkpoints)] == [1]


def test_a_run_whose_time_is_up_is_measured_saved_and_finished(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    plan, more = runs["timed"]
    folder = RunFolder(Path(plan.run_dir))
    outcome = read_json(folder.outcome)
    assert (outcome["step"], outcome["best"]["step"], outcome["last_eval"]["step"]) == (1, 1, 1)
    assert "stopped early at step 1 of 6" in outcome["message"]
    assert "stop.max_time_s = 0.001" in outcome["message"]
    assert [c.step for c in committed(folder.checkpoints)] == [1]
    exported = export_run(plan, folder, folder.export, {k: outcome[k] for k in ("best",)})
    assert evaluation_loss(plan, load_exported(exported)[1]) == pytest.approx(
        outcome["best"]["loss"], rel=1e-4
    )
    whole = runs["unfreezing-zero2"][0]
    assert losses(plan) + losses(more) == losses(whole), (
        "with more time it goes on as if never stopped"
    )


def test_only_a_run_that_wants_for_time_goes_on_after_its_end(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    plan, more = runs["timed"]
    out_of_time, whole, early = (
        read_json(RunFolder(Path(p.run_dir)).outcome) for p in (plan, more, runs["early"][0])
    )
    assert _is_over(out_of_time, plan.spec)
    assert not _is_over(out_of_time, more.spec)
    assert not _is_over(out_of_time, runs["unfreezing-zero2"][0].spec), "no limit any more"
    assert _is_over(whole, more.spec)
    assert _is_over(early, more.spec)
    assert not _is_over({**whole, "status": "stopped"}, more.spec)
    assert not _is_over(None, more.spec)


def test_a_run_that_goes_on_from_anothers_checkpoint_keeps_settings_of_its_own(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    before, after = (decays(at(plan, STEPS)) for plan in runs["other"])
    assert before == {0.01, 0.0}
    assert after == {0.25, 0.0}


def decays(checkpoint: Committed) -> set[float]:
    """Weight decays of the optimizer's groups in a ZeRO 2 checkpoint."""
    path = min(checkpoint.folder.rglob("*_optim_states.pt"))
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    return {group["weight_decay"] for group in state["base_optimizer_state"]["param_groups"]}


def test_dropout_is_on_from_the_first_step(runs: dict[str, tuple[Plan, Plan]]) -> None:
    plan = runs["rmsprop-dropout-zero2"][0]
    first = read_steps(RunFolder(Path(plan.run_dir)).steps)[0]["loss"]
    undropped = read_steps(RunFolder(Path(runs["adafactor"][0].run_dir)).steps)[0]["loss"]
    assert first != pytest.approx(undropped, rel=1e-4), "the same weights and the same rows"


def test_a_rate_lowered_on_a_plateau_stays_lowered_after_a_resume(
    runs: dict[str, tuple[Plan, Plan]],
) -> None:
    straight, resumed = (
        {r["step"]: r["lr"] for r in read_steps(RunFolder(Path(plan.run_dir)).steps)}
        for plan in runs["lion-mixup-plateau-zero3"]
    )
    assert min(straight.values()) < 0.01, "it was lowered"
    assert {step: straight[step] for step in resumed} == resumed


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
