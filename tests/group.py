"""Real worker groups for tests: several trials, one after another, in one Ray Train run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.data.prepare import prepare
from orchestrator.plan import Plan, make_plan, this_machine
from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder
from orchestrator.spec import JobSpec


def plan_of(spec: JobSpec, **changes: Any) -> Plan:
    """The plan of a job on this machine, its data prepared (needs the Ray fixture)."""
    plan = make_plan(spec, this_machine(), prepare(spec))
    return plan.model_copy(update=changes)


SHORT_BLOCK_ROWS = 16


def run_trials(plans: Sequence[Plan], short_blocks: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run the plans in order in one worker group; returns their Results as dicts.

    Trials named in `short_blocks` read blocks of 16 rows, so that Ray Data serves even a small one.

    Rank 0 also leaves `logits.pt` in each run folder: the engine's own, for the first evaluation rows.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    world_size = plans[0].num_workers

    def work(config: dict[str, Any]) -> None:
        import torch

        from orchestrator.data import stream
        from orchestrator.train.trial import Trial

        usual = stream.BLOCK_ROWS
        torch.set_num_threads(1)
        for text in config["plans"]:
            plan = Plan.model_validate_json(text)
            folder = RunFolder(Path(plan.run_dir))
            stream.BLOCK_ROWS = SHORT_BLOCK_ROWS if folder.name in short_blocks else usual
            trial = Trial(plan, folder)
            result = trial.train()
            logits = None
            if plan.eval_data and plan.spec.task.type == "text_classification":
                logits = probe(trial.engine, plan)
            if trial.rank == 0:
                torch.save(logits, folder.root / "logits.pt")
                folder.outcome.write_text(json.dumps(asdict(result)))
            trial.close()

    root = Path(plans[0].run_dir).parent
    TorchTrainer(
        work,
        train_loop_config={"plans": [p.model_dump_json() for p in plans]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=world_size),
        run_config=RunConfig(name=f"group-{world_size}", storage_path=str(root / "ray")),
    ).fit()
    return [json.loads(RunFolder(Path(p.run_dir)).outcome.read_text()) for p in plans]


def probe(model: Any, plan: Plan) -> Any:
    """Logits of the first eight evaluation rows."""
    import numpy as np
    import torch

    from orchestrator.data.manifest import read_manifest
    from orchestrator.data.shards import open_shards
    from orchestrator.data.stream import unpack_rows

    assert plan.eval_data is not None
    manifest = read_manifest(Path(plan.eval_data.folder))
    assert manifest is not None
    rows = unpack_rows(
        open_shards(plan.eval_data.folder, manifest).take(np.arange(min(8, manifest.rows)))
    )
    batch = plan.spec.task.collate(rows, np.ones(len(rows)), 0)
    model.eval()
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.clone()


def losses(plan: Plan) -> list[float]:
    """Training loss per step of a finished trial."""
    return [r["loss"] for r in read_steps(RunFolder(Path(plan.run_dir)).steps)]


def figures(plan: Plan) -> list[tuple[float, float]]:
    """(loss, gradient norm) per step: a last bit shows in the norm where the loss hides it."""
    return [(r["loss"], r["grad_norm"]) for r in read_steps(RunFolder(Path(plan.run_dir)).steps)]


def named(plan: Plan, name: str, **changes: Any) -> Plan:
    """The same plan with a run folder of its own."""
    run_dir = str(Path(plan.run_dir).parent / name)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return plan.model_copy(update={"run_dir": run_dir, **changes})
