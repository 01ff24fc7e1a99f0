"""A run from job to report: prepare, plan, train, export."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.data.prepare import Prepared, Split, find_prepared, prepare
from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.launch.ray_watch import RayWatch
from orchestrator.launch.run_lock import at_saved_stage, locked
from orchestrator.launch.session import attached_address, ray_session, send_chatter_to
from orchestrator.launch.signals import stop_on_signals
from orchestrator.launch.workers import make_trainer
from orchestrator.plan import Cluster, Plan, make_plan, this_machine
from orchestrator.plan.cluster import live_cluster
from orchestrator.report.html import write_report
from orchestrator.report.progress import ProgressView
from orchestrator.report.records import append_event, read_steps
from orchestrator.report.terminal import Terminal, styled
from orchestrator.report.tracking import Tracker
from orchestrator.run_folder import RunFolder, read_object, read_outcome, write_json
from orchestrator.spec import JobSpec

POLL_S = 0.1
COMMIT_S = 30.0
"""How long workers without a GCS may take to commit; Ray ends this process 60 s after it was lost."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run. `status` is `finished` or `stopped`."""

    folder: RunFolder
    plan: Plan
    status: str
    message: str
    best: dict[str, Any] | None
    baseline: dict[str, Any] | None
    export: Path | None
    report: Path


def plan_job(spec: JobSpec, cluster: Cluster | None = None) -> Plan:
    """The plan of a job, its data prepared first where it is not: counts in a plan are counts, not guesses.

    Without a `cluster` it is what `train` would run here, a run of that name continued.
    """
    prepared, here = find_prepared(spec), this_machine()
    if prepared is None or (cluster is None and attached_address()):
        with ray_session():
            prepared, here = prepare(spec), cluster_here()
    plan = make_plan(spec, cluster or here, prepared)
    return plan if cluster else at_saved_stage(plan)


def cluster_here() -> Cluster:
    """The cluster this process belongs to, else this machine."""
    return live_cluster() if attached_address() else this_machine()


def train(spec: JobSpec, fresh: bool = False, console: Console | None = None) -> Outcome:
    """Run a job to its end, or on from where it stopped.

    `fresh` puts an earlier run of that name aside. Raises what prepare, make_plan and locked raise,
    and TrainingError where training diverged, storage failed or restarts ran out.
    """
    console = console or Terminal(quiet=True)
    must_have_secrets(spec)
    with ray_session():
        prepared = prepared_data(spec, console)
        plan = make_plan(spec, cluster_here(), prepared)
        if not fresh:
            plan = at_saved_stage(plan)
        with locked(plan, fresh) as folder:
            send_chatter_to(folder.logs / "driver.log")
            outcome = read_outcome(folder)
            over = _is_over(outcome, spec)
            if outcome is None or not over:
                outcome = launch(plan, folder, console)
            return finish(plan, folder, outcome, console, anew=not over)


def _is_over(outcome: dict[str, Any] | None, spec: JobSpec) -> bool:
    """Tell whether a run has nothing left to do; one that ended for want of time goes on where it gets more."""
    if outcome is None or outcome["status"] != "finished":
        return False
    if not outcome["facts"].get("out_of_time"):
        return True
    limit_s = spec.stop.max_time_s
    return limit_s is not None and limit_s <= outcome["facts"].get("elapsed_s", 0.0)


def must_have_secrets(spec: JobSpec) -> None:
    """Whoever runs the cluster gives its processes the secrets; the job only names them.

    Raises OrchestratorError where one is missing.
    """
    missing = [name for name in spec.runtime.secrets if not os.environ.get(name)]
    if attached_address() and missing:
        raise OrchestratorError(
            f"runtime.secrets: {', '.join(missing)} not set where the driver runs. "
            "Give it to the cluster's containers (env from a Secret), or drop it from the job."
        )


def prepared_data(spec: JobSpec, console: Console) -> dict[Split, Prepared]:
    done = prepare(spec)
    for split, one in done.items():
        m = one.manifest
        how = "found ready" if one.was_ready else "prepared"
        console.print(styled(f"{split}: {m.rows:,} rows, {m.tokens:,} tokens, {how}", "dim"))
        if one.teacher is not None:
            how = "found ready" if one.teacher.was_ready else "asked"
            size = one.teacher.manifest.size_bytes / 2**20
            console.print(styled(f"teacher: {size:,.1f} MiB of outputs, {how}", "dim"))
        if m.bad_rows:
            bad = f"{m.bad_rows} bad rows skipped; see {one.folder}/bad_rows.jsonl"
            console.print(styled(bad, "yellow"))
    return done


def launch(plan: Plan, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Train in a worker group until it ends; returns the outcome that the workers left.

    Raises TrainingError.
    """
    _forget_results(folder)
    append_event(folder.events, "launch", workers=plan.num_workers, total_steps=plan.total_steps)
    fit = _FitThread(plan)
    tracking = plan.spec.tracking
    project = tracking.project or plan.spec.name
    tracker = Tracker(folder, tracking.mlflow, project, attached_address() is not None)
    with (
        ProgressView(folder, plan.total_steps, plan.metric, console) as view,
        stop_on_signals(lambda: _ask_to_stop(folder), view.say),
    ):
        watch = RayWatch()
        fit.start()
        while fit.is_alive() and not watch.lost():
            tracker.update(view.update())
            time.sleep(POLL_S)
        why = watch.lost() if fit.is_alive() else None
        if why and watch.workers_live():
            _let_workers_commit(folder)
        tracker.update(view.update())
    tracker.close()
    if why:
        folder.outcome.unlink(missing_ok=True)  # the workers' own word: they were asked to stop
        return _outcome(plan, folder, TrainingError(f"{why} The workers are lost with it."))
    return _outcome(plan, folder, fit.error)


def _let_workers_commit(folder: RunFolder) -> None:
    """Ask workers that have lost their Ray to commit a checkpoint, and give them time for it."""
    _ask_to_stop(folder)
    deadline = time.monotonic() + COMMIT_S
    while time.monotonic() < deadline and not folder.outcome.exists():
        time.sleep(POLL_S)


def _forget_results(folder: RunFolder) -> None:
    """An earlier launch may have been stopped, and its model exported by `eval` or `predict`."""
    folder.outcome.unlink(missing_ok=True)
    folder.teacher.unlink(missing_ok=True)
    shutil.rmtree(folder.export, ignore_errors=True)


def _outcome(plan: Plan, folder: RunFolder, error: BaseException | None) -> dict[str, Any]:
    """Return the run's outcome; the report is written before an error is raised."""
    outcome = read_outcome(folder)
    if outcome is None:
        steps = read_steps(folder.steps)
        step = steps[-1]["step"] if steps else 0
        outcome = {"status": "lost", "step": step, "best": None, "last_eval": None, "facts": {}}
        outcome["message"] = _lost(folder, error)
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            write_json(folder.outcome, outcome)
    append_event(folder.events, "end", status=outcome["status"], step=outcome["step"])
    if outcome["status"] in ("diverged", "storage_failed", "failed", "lost"):
        exported = _export_best(plan, folder, outcome) if outcome["status"] == "diverged" else ""
        with contextlib.suppress(OSError):
            write_report(folder)
        how = _how_to_go_on(folder, outcome)
        raise TrainingError(f"{outcome['message']}\n{how}{exported}") from error
    return outcome


def _export_best(plan: Plan, folder: RunFolder, outcome: dict[str, Any]) -> str:
    """Export the best weights from before training diverged, where any were evaluated; says so."""
    from orchestrator.train.export import export_run

    if outcome["best"] is None:
        return ""
    figures = {k: outcome[k] for k in ("best", "last_eval")} | {"baseline": None}
    try:
        path = export_run(plan, folder, folder.export, figures)
    except (OrchestratorError, OSError) as error:
        return f"\nThe best weights could not be exported: {error}"
    return f"\nThe best weights before, of step {outcome['best']['step']}, are exported: {path}"


class _FitThread(threading.Thread):
    """`TrainController.fit()` off the main thread, which keeps the signals and the screen."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(name="fit", daemon=True)
        self.plan = plan
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            make_trainer(self.plan, uuid.uuid4().hex[:8]).fit()
        except BaseException as error:  # noqa: BLE001, shown by launch
            self.error = error


def _ask_to_stop(folder: RunFolder) -> bool:
    """Ask the workers to commit and leave; False where they have been asked before."""
    if folder.stop_request.exists():
        return False
    folder.stop_request.touch()
    return True


def _lost(folder: RunFolder, error: BaseException | None) -> str:
    """Why the worker group is gone for good, in its own last words."""
    text = str(error).strip() if error else "the workers left without a result"
    lines = [line for line in text.splitlines() if line.strip()]
    shown = "\n  ".join(lines[-12:])
    return f"training failed:\n  {shown}\nLogs: {folder.logs}"


def _how_to_go_on(folder: RunFolder, outcome: dict[str, Any]) -> str:
    """The newest checkpoint that is worth something, and what to do."""
    from orchestrator.train.checkpoint import committed

    diverged = outcome["status"] == "diverged"
    good_until = outcome["facts"].get("good_until_step", 0) if diverged else outcome["step"]
    found = [c for c in committed(folder.checkpoints) if not diverged or c.step <= good_until]
    kind = "good" if diverged else "committed"
    where = (
        f"Last {kind} checkpoint: step {found[0].step} ({found[0].folder})."
        if found
        else (f"No {kind} checkpoint is there.")
    )
    if diverged:
        return f"{where} Going on would repeat the same steps: start over with what you change, --fresh or name=…"
    if not found:
        return where
    again = "Once its cause is mended, the" if outcome["status"] == "failed" else "The"
    return f"{where} {again} same command goes on from there."


def finish(
    plan: Plan, folder: RunFolder, outcome: dict[str, Any], console: Console, anew: bool
) -> Outcome:
    """Baseline, export and report of a run that ended well.

    `anew`: it has just been trained; `predict` may have exported it meanwhile, from a checkpoint before the last.
    """
    with _safe_to_repeat(folder, outcome):
        baseline = _baseline(plan, folder, console)
    exported: Path | None = folder.export if folder.export.exists() else None
    if outcome["status"] == "finished" and (anew or exported is None):
        from orchestrator.train.export import export_run

        figures = {k: outcome[k] for k in ("best", "last_eval")} | {"baseline": baseline}
        with _safe_to_repeat(folder, outcome):
            exported = export_run(plan, folder, folder.export, figures)
    with _safe_to_repeat(folder, outcome):
        if exported is not None:
            _compare(plan, folder, exported, console)
        report = write_report(folder)
    return Outcome(
        folder,
        plan,
        outcome["status"],
        outcome["message"],
        outcome["best"],
        baseline,
        exported,
        report,
    )


@contextmanager
def _safe_to_repeat(folder: RunFolder, outcome: dict[str, Any]) -> Iterator[None]:
    """Turn a full or read-only disk inside the block into a TrainingError that says what is safe.

    The space that was held back is released, so that the report can be written.
    """
    try:
        yield
    except OSError as error:
        folder.reserve.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            write_report(folder)
        raise TrainingError(
            f"{error}\nTraining itself is safe: it {outcome['status']} at step {outcome['step']}, and its "
            f"checkpoints are in {folder.checkpoints}. Run the same command again once there is space: it "
            "repeats no step, and writes the export and the report."
        ) from error


def _compare(plan: Plan, folder: RunFolder, exported: Path, console: Console) -> None:
    """Return the comparison of teacher and student for the report, measured once."""
    asked = plan.spec.distillation is not None and plan.spec.distillation.compare_rows
    if not asked or plan.eval_data is None or folder.teacher.exists():
        return
    console.print(styled("comparing teacher and student …", "dim"))
    from orchestrator.train.compare import compare_with_teacher

    write_json(folder.teacher, compare_with_teacher(plan, exported))


def _baseline(plan: Plan, folder: RunFolder, console: Console) -> dict[str, Any] | None:
    if plan.spec.evaluation.baseline_rows is None or plan.eval_data is None:
        return None
    found = read_object(folder.baseline, {"name": str, "train_rows": int, "metrics": dict})
    if found is None:
        console.print(styled("fitting the frozen-feature baseline …", "dim"))
        from orchestrator.train.baseline import frozen_feature_baseline

        found = frozen_feature_baseline(plan)
        write_json(folder.baseline, found)
    return found
