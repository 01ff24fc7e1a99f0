"""The mathematics do not depend on how the work is cut: real DeepSpeed workers against plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from group import SHORT_BLOCK_ROWS, figures, losses, named, plan_of, probe, run_trials

from orchestrator.data.manifest import read_manifest
from orchestrator.data.order import PADDING
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import FIRST_BLOCKS, unpack_rows
from orchestrator.errors import TrainingError
from orchestrator.launch.run import _outcome
from orchestrator.model.build import build_model
from orchestrator.plan import Plan
from orchestrator.report.records import read_records
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.spec import JobSpec
from orchestrator.train.checkpoint import committed, newest_valid
from orchestrator.train.export import best_checkpoint, export_run, load_exported
from orchestrator.train.optimizer import make_optimizer

STEPS = 30
ROWS = 203  # no multiple of anything: every epoch ends in a partial batch


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain-sgd-zero3": {
        "optimizer": {"type": "sgd", "momentum": 0, "lr": 0.5},
        "zero": {"stage": 3},
    },
    "adam-zero2": {
        "optimizer": {"type": "adam", "weight_decay": 0.1, "lr": 3e-3, "layer_decay": 0.5},
        "zero": {"stage": 2},
    },
    "rmsprop-zero1": {"optimizer": {"type": "rmsprop", "lr": 1e-3}, "zero": {"stage": 1}},
    "lion-zero2": {"optimizer": {"type": "lion", "lr": 1e-3}, "zero": {"stage": 2}},
    "adafactor-zero0": {"optimizer": {"type": "adafactor", "lr": 1e-2}},
    "muon-zero0": {"optimizer": {"type": "muon", "lr": 1e-2}},
}


def job(models: tiny.Tiny, folder: Path, name: str, **fields: Any) -> JobSpec:
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(ROWS))
    held_out = tiny.write_csv(folder / "eval.csv", tiny.labeled(31, seed=1))
    settings = {
        "name": name,
        "batch": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "schedule": {"type": "cosine", "warmup_steps": 5},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 15},
        "evaluation": {"every_steps": "end"},
        "resources": {"num_workers": 2},
        "data": {"eval": str(held_out)},
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


def zero_stage(plan: Plan, stage: int) -> Plan:
    """The plan at another ZeRO stage."""
    spec = plan.spec.model_copy(update={"zero": plan.spec.zero.model_copy(update={"stage": stage})})
    return plan_of(spec.model_copy(update={"name": f"{plan.spec.name}-zero{stage}"}))


def plain_loop(plan: Plan, before: Callable[[Any, int], None] | None = None) -> list[float]:
    """The same training in one process with nothing but torch; loss per step.

    `before` is called with the model and the step, before its forward pass.
    """
    spec, data = plan.spec, plan.train_data
    manifest = read_manifest(Path(data.folder))
    assert manifest is not None
    reader = open_shards(data.folder, manifest)
    from orchestrator.data.order import Order

    order = Order(
        tuple(s.rows for s in manifest.shards),
        plan.global_batch_size,
        spec.seed,
        "full",
        lengths=reader.column("length") if plan.group_by_length else None,
    )
    model = build_model(spec, plan.labels)
    model.train()
    optimizer = make_optimizer(plan, model)
    out = []
    for step in range(plan.total_steps):
        if before:
            before(model, step)
        ids = order.batch(step)
        rows = unpack_rows(reader.take(ids[ids != PADDING]))
        batch = spec.task.collate(rows, np.ones(len(rows)), 0)
        targets = reader.column("n_targets")[ids[ids != PADDING]].sum()
        loss = spec.task.loss_sum(model, batch) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clipping or 1e9)
        for group in optimizer.param_groups:
            factor = spec.schedule.lr_factor(step, plan.total_steps)
            group["lr"] = plan.learning_rate * group["lr_scale"] * factor
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(loss.detach()))
    return out


@pytest.fixture(scope="module")
def pair(ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Finished trials on two workers, all in one worker group: every ZeRO stage, then stage 2 again."""
    folder = tmp_path_factory.mktemp("pair")
    base = plan_of(job(models, folder, "classify"))
    plans = {f"zero{stage}": zero_stage(base, stage) for stage in range(4)}
    plans["again"] = named(plans["zero2"], "again")
    plans["accumulating"] = plan_of(
        job(models, folder, "accumulating", batch={"global_batch_size": 8, "micro_batch_size": 2})
    )
    for name, fields in OPTIMIZERS.items():
        plans[name] = plan_of(job(models, folder, name, stop={"max_steps": 10}, **fields))
    plans["lora"] = plan_of(job(models, folder, "lora", tuning={"type": "lora"}, zero={"stage": 3}))
    plans["one-row"] = plan_of(
        job(
            models,
            folder,
            "one-row",
            stop={"max_steps": 1},
            schedule={"type": "constant"},
            data={"eval": str(tiny.write_csv(folder / "one.csv", tiny.labeled(1)))},
        )
    )
    for plan in plans.values():
        Path(plan.run_dir).mkdir(parents=True, exist_ok=True)
    # One stage goes on from the rows that a rank reads itself to those that Ray Data brings.
    assert STEPS * 4 > 2 * FIRST_BLOCKS * SHORT_BLOCK_ROWS
    results = run_trials(list(plans.values()), short_blocks=[Path(plans["zero3"].run_dir).name])
    assert [r["status"] for r in results] == ["finished"] * len(plans)
    return plans


@pytest.fixture(scope="module")
def reference(pair: dict[str, Plan]) -> list[float]:
    return plain_loop(pair["zero0"])


@pytest.mark.parametrize("trial", OPTIMIZERS)
def test_every_optimizer_under_zero_follows_itself_in_a_plain_loop(
    trial: str, pair: dict[str, Plan]
) -> None:
    got, alone = losses(pair[trial]), plain_loop(pair[trial])
    still = plain_loop(pair[trial].model_copy(update={"learning_rate": 0.0}))
    np.testing.assert_allclose(got, alone, rtol=1e-3)
    assert not np.allclose(got, still, rtol=2e-3), "it moves, so agreement says something"


@pytest.mark.parametrize("trial", ["zero0", "zero1", "zero2", "zero3", "accumulating"])
def test_two_workers_follow_a_plain_torch_loop(
    trial: str, pair: dict[str, Plan], reference: list[float]
) -> None:
    got = losses(pair[trial])
    assert len(got) == STEPS
    assert reference[0] > 1.02 * min(reference)  # it learns, so agreement says something
    np.testing.assert_allclose(got, reference, rtol=1e-4)


def test_one_worker_with_twice_the_accumulation_follows_it_too(
    ray: Any, models: tiny.Tiny, tmp_path: Path, reference: list[float]
) -> None:
    spec = job(
        models,
        tmp_path,
        "alone",
        batch={"global_batch_size": 8, "micro_batch_size": 4},
        resources={"num_workers": 1},
    )
    plan = plan_of(spec)
    assert (plan.num_workers, plan.accumulation) == (1, 2)
    Path(plan.run_dir).mkdir(parents=True)
    run_trials([plan])
    np.testing.assert_allclose(losses(plan), reference, rtol=1e-4)


def test_a_trial_is_bit_identical_whatever_ran_before_it_in_its_workers(
    pair: dict[str, Plan],
) -> None:
    assert figures(pair["again"]) == figures(pair["zero2"])


def test_no_kind_of_trial_changes_what_the_next_one_computes(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    """Each kind in one worker, and after it the same trial at ZeRO 2."""
    kinds: list[dict[str, Any]] = [
        {"zero": {"stage": 3}},
        {"tuning": {"type": "lora"}, "zero": {"stage": 3}},
        {"tuning": {"type": "prompt"}},
        {"tuning": {"type": "full", "unfreeze_every_steps": 3}},
        {"precision": "bf16", "zero": {"stage": 3}},
        {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
        {"regularization": {"neftune_alpha": 5.0, "averaging": {"type": "ema", "decay": 0.9}}},
    ]
    short = {
        "stop": {"max_steps": 12},
        "resources": {"num_workers": 1},
        "model": {"dropout": 0.1},
        # Biases begin at zero: how they are added shows only once they have grown.
        "optimizer": {"lr": 3e-2},
    }
    always = plan_of(job(models, tmp_path, "always", zero={"stage": 2}, **short))
    plans = [named(always, "first")]
    for i, fields in enumerate(kinds):
        other = plan_of(job(models, tmp_path, f"other{i}", **short, **fields))
        plans += [named(other, f"other{i}"), named(always, f"after{i}")]
    assert {r["status"] for r in run_trials(plans)} == {"finished"}
    first, *rest = plans
    for other, after in zip(rest[::2], rest[1::2], strict=True):
        assert figures(after) == figures(first), other.spec


@pytest.mark.parametrize(("trial", "rows"), [("zero2", 31), ("one-row", 1)])
def test_evaluation_counts_every_row_once(trial: str, rows: int, pair: dict[str, Plan]) -> None:
    folder = RunFolder(Path(pair[trial].run_dir))
    record = newest_valid(folder.checkpoints, print)
    assert record is not None
    metrics = record.facts["progress"]["last_eval"]
    assert metrics["rows"] == rows
    assert sum(map(sum, metrics["confusion"])) == rows


@pytest.mark.parametrize("trial", ["zero0", "zero1", "zero2", "zero3", "lora"])
def test_export_gives_the_engines_logits(trial: str, pair: dict[str, Plan]) -> None:
    plan = pair[trial]
    folder = RunFolder(Path(plan.run_dir))
    step = plan.total_steps
    assert best_checkpoint(folder, step).step == step
    export_run(plan, folder, folder.export, {"best": {"step": step}})
    _, model, tokenizer = load_exported(folder.export)
    engine_logits = torch.load(folder.root / "logits.pt")
    torch.testing.assert_close(probe(model, plan), engine_logits, rtol=1e-5, atol=1e-6)
    assert tokenizer("the film was great")["input_ids"]


def test_an_export_of_other_weights_than_the_best_says_so(
    pair: dict[str, Plan], tmp_path: Path
) -> None:
    plan = pair["zero1"]
    folder = RunFolder(Path(plan.run_dir))
    best = {"step": 7, "accuracy": 0.99, "rows": 31}
    last = {"step": STEPS, "accuracy": 0.5, "rows": 31}
    for last_eval, known in ((last, "0.5000"), (None, None)):
        figures = {"best": best, "last_eval": last_eval}
        card = (export_run(plan, folder, tmp_path / "export", figures) / "README.md").read_text()
        assert "step 7, is damaged or gone: step 30 is exported" in card
        assert "0.9900" not in card
        assert ("| accuracy |" in card) == (known is not None)
        assert known is None or known in card
    said = [e["text"] for e in read_records(folder.events) if e["kind"] == "warning"]
    assert "step 30 is exported" in said[-1]


def test_a_run_that_diverges_still_exports_the_best_it_had(pair: dict[str, Plan]) -> None:
    plan = pair["zero1"]
    folder = RunFolder(Path(plan.run_dir))
    kept, before = folder.outcome.read_text(), {"step": STEPS, "accuracy": 0.5, "rows": 31}
    outcome: dict[str, Any] = {"status": "diverged", "step": 33, "message": "training diverged"}
    outcome["facts"] = {"good_until_step": 31}
    for best, says in ((before, "of step 30, are exported"), (None, "Last good checkpoint")):
        shutil.rmtree(folder.export, ignore_errors=True)
        write_json(folder.outcome, {**outcome, "best": best, "last_eval": best})
        with pytest.raises(TrainingError, match=says):
            _outcome(plan, folder, None)
        assert folder.export.exists() == (best is not None)
    folder.outcome.write_text(kept)


def test_a_lora_checkpoint_holds_the_adapter_and_not_the_base(pair: dict[str, Plan]) -> None:
    plan, full = pair["lora"], pair["zero3"]
    sizes = [
        sum(
            f.stat().st_size
            for f in committed(RunFolder(Path(p.run_dir)).checkpoints)[0].folder.rglob("*.pt")
        )
        for p in (plan, full)
    ]
    assert sizes[0] < sizes[1] / 2


def test_old_checkpoints_go_and_the_newest_stay(pair: dict[str, Plan]) -> None:
    folder = RunFolder(Path(pair["zero1"].run_dir))
    assert [c.step for c in committed(folder.checkpoints)] == [30, 15]
    assert not list(folder.checkpoints.glob(".staging-*"))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_closed_engine_leaves_nothing_in_memory_and_torch_as_it_was(
    ray: Any, models: tiny.Tiny, tmp_path: Path, stage: int
) -> None:
    plan = plan_of(
        job(models, tmp_path, f"closed{stage}", zero={"stage": stage}, resources={"num_workers": 1})
    )

    @ray.remote(num_cpus=1, max_calls=1)  # a process of its own
    def left_over(plan_json: str, store: str) -> tuple[list[int], list[str]]:
        import gc
        import os

        import torch.distributed as dist

        from orchestrator.train import engine as zero

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # as Ray Train sets them
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        plan = Plan.model_validate_json(plan_json)
        left = []
        functions = dict(vars(torch.nn.functional))
        for _ in range(3):
            engine = zero.open_engine(plan, build_model(plan.spec, plan.labels))
            batch = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
            engine.backward(engine(**batch).logits.sum())
            engine.step()
            zero.close_engine(engine)
            del engine
            gc.collect()
            alive = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
            left.append(sum(t.numel() for t in alive))
        dist.destroy_process_group()
        now = vars(torch.nn.functional)
        return left, [name for name, function in functions.items() if now[name] is not function]

    tensors, changed = ray.get(left_over.remote(plan.model_dump_json(), str(tmp_path / "store")))
    assert not changed, "the next trial's model would be computed in another way"
    first, _, last = tensors
    assert last - first < 1000, "the model alone has two hundred times as many values"
