"""Finalize a sweep: its outcome, the best trial's job and model, the report."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.report.sweep_html import write_sweep_report
from orchestrator.report.trial_log import SweepLog, TrialState
from orchestrator.run_folder import SweepFolder, write_atomically, write_json
from orchestrator.spec import dump_spec, parse_spec
from orchestrator.spec.sweep_rules import with_values
from orchestrator.sweep.plan import SweepPlan


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left behind. `status`: `finished`, `budget` or `stopped`."""

    folder: SweepFolder
    plan: SweepPlan
    status: str
    message: str
    best: TrialState | None
    trials: int
    export: Path | None
    report: Path


def finish(plan: SweepPlan, folder: SweepFolder, status: str, message: str) -> SweepOutcome:
    """Best job, its exported model, report; also of a sweep that failed, before that is raised."""
    log = SweepLog(folder.log, plan.base.selection_metric)
    best, exported = log.best(), None
    if best is None and status == "finished":
        why = next((t.message for t in log.trials.values() if t.message), "")
        status = "failed"
        message = f"no trial reported anything. The first one said: {why}\nLogs: {folder.logs}"
    try:
        _write_outcome(folder, log, status, message)
        exported = _export_best(plan, folder, best) if best is not None else None
    except (OrchestratorError, OSError) as error:
        more = f"The best model could not be exported: {error}"
        status, message = "failed", f"{message}\n{more}" if message else more
        with suppress(OSError):
            _write_outcome(folder, log, status, message)
    with suppress(*((OSError,) if status == "failed" else ())):
        report = write_sweep_report(folder)
    if status == "failed":
        raise TrainingError(message)
    return SweepOutcome(folder, plan, status, message, best, len(log.trials), exported, report)


def _write_outcome(folder: SweepFolder, log: SweepLog, status: str, message: str) -> None:
    best = log.best()
    outcome = {
        "status": status, "message": message, "best": best.id if best else None,
        "value": best.best if best else None, "trials": len(log.trials),
    }  # fmt: skip
    write_json(folder.outcome, outcome)


def _export_best(plan: SweepPlan, folder: SweepFolder, best: TrialState) -> Path | None:
    from orchestrator.train.checkpoint import committed
    from orchestrator.train.export import export_run, load_plan

    write_atomically(folder.best, best_job(plan, best))
    mine = folder.trial(best.id)
    if not committed(mine.checkpoints):
        return folder.export if folder.export.exists() else None
    step = best_step(best, plan.base.metric)
    figures = {"best": {"step": step, **best.reports[step]}}
    return export_run(load_plan(mine), mine, folder.export, figures)


def best_step(best: TrialState, metric: str) -> int:
    """The step of a trial's best report; of equal ones the first, which is the one that was saved."""
    return min(s for s, figures in best.reports.items() if figures.get(metric) == best.best)


def best_job(plan: SweepPlan, best: TrialState) -> str:
    """The job with the best trial's values, as YAML that `train` takes."""
    data = with_values(plan.spec, {**best.values, "name": f"{plan.spec.name}-best"})
    return dump_spec(parse_spec(data))
