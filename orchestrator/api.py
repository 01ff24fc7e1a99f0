"""The verbs as functions: what the command line calls, and Python users too."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.prepare import Prepared, Split, find_prepared
from orchestrator.data.prepare import prepare as _prepare
from orchestrator.errors import OrchestratorError
from orchestrator.launch.measure import evaluate_export
from orchestrator.launch.run import Outcome, plan_job, train
from orchestrator.launch.session import ray_session
from orchestrator.plan import Cluster, Plan
from orchestrator.report.runs import write_report_on
from orchestrator.run_folder import RunFolder, SweepFolder, find_run, read_object, read_outcome
from orchestrator.spec import JobSpec
from orchestrator.spec.secret_rules import refuse_secrets
from orchestrator.sweep.finalize import SweepOutcome
from orchestrator.sweep.run import make_sweep_plan, sweep
from orchestrator.train.export import export_run, load_exported, load_plan
from orchestrator.train.predict import predictions

__all__ = [
    "Outcome", "Plan", "SweepOutcome", "evaluate", "export", "find_run", "make_plan",
    "make_sweep_plan", "predict", "prepare", "report", "sweep", "train",
]  # fmt: skip


def make_plan(spec: JobSpec, cluster: Cluster | None = None) -> Plan:
    """Return the plan of the job. Prepares the data first where it is not ready.

    `cluster`: `describe_cluster("8xH100x4")`; default: the Ray cluster in RAY_ADDRESS, else this machine.
    Raises PlanError where the job cannot fit, DataError for rows that cannot be used.
    """
    return plan_job(spec, cluster)


def prepare(spec: JobSpec) -> dict[Split, Prepared]:
    """Tokenize, pack and shard the job's rows, once per fingerprint. Raises DataError."""
    ready = find_prepared(spec)
    if ready is not None:
        return ready
    with ray_session():
        return _prepare(spec)


def evaluate(
    folder: RunFolder, data: Sequence[str], num_workers: int | None = None
) -> dict[str, Any]:
    """Exact metrics of the run's exported model on other files of the same columns.

    Raises SpecError where a URL among them holds a secret, DataError for rows that cannot be used.
    """
    refuse_secrets(list(data), "data")
    plan = load_plan(folder)
    exported = export(folder, folder.export) if not folder.export.exists() else folder.export
    return evaluate_export(
        plan, exported, tuple(data), folder.root / "eval" / "metrics.json", num_workers
    )


def predict(
    folder: RunFolder, inputs: Sequence[str | dict[str, Any]], batch_rows: int = 32
) -> list[dict[str, Any]]:
    """Return one prediction per input, in order; `why` in its place where there can be none.

    An input is a row with the columns that the task predicts from; a text stands for a row with one.
    Raises DataError for an input without them.
    """
    exported = export(folder, folder.export) if not folder.export.exists() else folder.export
    plan, model, tokenizer = load_exported(exported)
    return predictions(plan, model, tokenizer, inputs, batch_rows)


def export(folder: RunFolder, target: Path) -> Path:
    """The run's best committed checkpoint as a Hugging Face folder at `target`.

    Raises CheckpointError where no valid checkpoint exists, OrchestratorError where `target` is taken.
    """
    if target.exists() and any(target.iterdir()):
        raise OrchestratorError(f"{target} exists and is not empty. Name another folder.")
    if folder.export.exists() and target != folder.export:
        shutil.copytree(folder.export, target, dirs_exist_ok=True)
        return target
    outcome = read_outcome(folder) or {}
    figures = {k: outcome.get(k) for k in ("best", "last_eval")}
    baseline = read_object(folder.baseline, {"name": str, "train_rows": int, "metrics": dict})
    return export_run(load_plan(folder), folder, target, {**figures, "baseline": baseline})


def report(folder: RunFolder | SweepFolder) -> Path:
    """(Re)write the HTML report of a run or a sweep; returns its path."""
    return write_report_on(folder)
