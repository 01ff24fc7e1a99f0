"""Verbs on sweeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.options import Job, Overrides, Resume, Run, Storage, out, quiet_libraries, say
from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from orchestrator.plan import Cluster
    from orchestrator.run_folder import SweepFolder


def sweep(
    job: Job,
    overrides: Overrides = None,
    resume: Resume = True,
    storage_path: Storage = Path("runs"),
) -> None:
    """Run the job's sweep: many trials on warm worker groups; the same command, or its name, goes on."""
    given = overrides or []
    spec = load_spec(job, given) if job.is_file() else job_of_sweep(job, storage_path, given)
    quiet_libraries()
    from orchestrator.api import sweep as run
    from orchestrator.report.sweep_view import results_table
    from orchestrator.report.trial_log import open_log

    outcome = run(spec, fresh=not resume, console=out)
    out.print(results_table(open_log(outcome.folder), outcome.folder))
    if outcome.message:
        say(outcome.message)
    for name, path in (
        ("best job", outcome.folder.best),
        ("model", outcome.export),
        ("report", outcome.report),
    ):
        if path is not None and path.exists():
            say(f"{name}: {path}")
    if outcome.status == "stopped":
        raise typer.Exit(130)


def job_of_sweep(run: Path, storage_path: Path, overrides: list[str]) -> JobSpec:
    """The job that a sweep of this name, or in this folder, was started with: it goes on in its own folder."""
    from orchestrator.run_folder import find_sweep

    folder = find_sweep(run, storage_path)
    enter_its_folder(folder)
    here = f"storage_path={json.dumps(str(folder.root.parent))}"
    return load_spec(folder.spec, [here, *overrides], stored=True)


def enter_its_folder(sweep: SweepFolder) -> None:
    """Go where a sweep was started: relative paths of its job lead from there. A cluster's jobs stay."""
    from orchestrator.launch.session import attached_address
    from orchestrator.report.records import read_records

    launches = [e for e in read_records(sweep.events) if e["kind"] == "launch"]
    work_dir = launches[-1].get("work_dir") if launches else None
    if work_dir and Path(work_dir).is_dir() and attached_address() is None:
        os.chdir(work_dir)


def results(run: Run, storage_path: Storage = Path("runs")) -> None:
    """All trials of a sweep, best first."""
    from orchestrator.report.sweep_view import results_table
    from orchestrator.report.trial_log import open_log
    from orchestrator.run_folder import find_sweep

    folder = find_sweep(run, storage_path)
    out.print(results_table(open_log(folder), folder))


def show_sweep_plan(spec: JobSpec, target: Cluster | None, as_json: bool) -> None:
    """`plan` of a job with a sweep."""
    from orchestrator.api import make_sweep_plan
    from orchestrator.run_folder import SweepFolder
    from orchestrator.sweep.show import show_sweep

    made = make_sweep_plan(spec, target)
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        out.print(show_sweep(made, SweepFolder(Path(made.run_dir))))


def best_job(sweep: Path, storage_path: Path, overrides: list[str]) -> JobSpec:
    """The job of a sweep's best trial, with as many workers as `auto` takes, not as many as a slot had.

    Raises OrchestratorError where there is none yet.
    """
    from orchestrator.run_folder import find_sweep

    folder = find_sweep(sweep, storage_path)
    if not folder.best.exists():
        raise OrchestratorError(f"{folder.root}: no trial has reported anything yet.")
    enter_its_folder(folder)
    names = ("num_workers", "gpus_per_worker", "cpus_per_worker")
    not_a_slot = [f"resources.{name}=auto" for name in names]
    return load_spec(folder.best, [*not_a_slot, *overrides], stored=True)
