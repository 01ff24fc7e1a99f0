"""Exact metrics of an exported model on any data, by the run's own number of workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orchestrator.data.prepare import prepare_split
from orchestrator.launch.session import ray_session
from orchestrator.launch.workers import enter_work_dir
from orchestrator.plan import Plan, this_machine
from orchestrator.plan.data import check_rows, data_facts
from orchestrator.run_folder import read_object, write_json


def evaluate_export(
    plan: Plan, exported: Path, data: tuple[str, ...], out: Path, num_workers: int | None = None
) -> dict[str, Any]:
    """Prepare `data` as the run's evaluation rows were, and measure. Writes `out`, returns the metrics.

    Raises DataError for rows that cannot be used.
    """
    with ray_session():
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        prepared = prepare_split(plan.spec, "eval", plan.labels, paths=data)
        check_rows(plan.spec, plan.labels, {"eval": prepared})
        plan = plan.model_copy(update={"eval_data": data_facts(prepared)})
        on_gpu = plan.on_gpu and this_machine().gpus > 0
        TorchTrainer(
            measure_worker,
            train_loop_config={
                "plan": plan.model_dump_json(),
                "exported": str(exported),
                "out": str(out),
            },
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers or plan.num_workers, use_gpu=on_gpu
            ),
            run_config=RunConfig(name="eval", storage_path=str(out.parent / "ray")),
        ).fit()
    return read_object(out) or {}


def measure_worker(config: dict[str, Any]) -> None:
    """One worker of an evaluation."""
    import torch

    from orchestrator.train.evaluate import Evaluator
    from orchestrator.train.export import build_base, load_exported
    from orchestrator.train.reference import find_reference

    plan = Plan.model_validate_json(config["plan"])
    enter_work_dir(plan)
    torch.set_num_threads(plan.cpus_per_worker)
    device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    reference = None
    if plan.spec.task.has_reference:
        assert plan.eval_data is not None
        kept = Path(config["out"]).with_name("reference.npz")
        reference = find_reference(plan, plan.eval_data, build_base(plan).to(device), device, kept)
    _, model, _ = load_exported(Path(config["exported"]))
    metrics = Evaluator(plan, reference=reference)(model.to(device), device)
    if os.environ["RANK"] == "0":
        write_json(Path(config["out"]), metrics)
