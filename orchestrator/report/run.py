"""The files of a run folder, read once for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.metric import Metric
from orchestrator.report.records import finite, read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json

Facts = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Content of a run folder. Missing files are empty values; `notes` names unreadable ones."""

    name: str
    plan: Facts
    outcome: Facts
    baseline: Facts
    teacher: Facts
    """Teacher and student compared."""
    steps: list[Facts]
    """One record per step: a step that was replayed after a restart is here once."""
    all_steps: list[Facts]
    evals: list[Facts]
    events: list[Facts]
    job_text: str
    checkpoint: tuple[str, int] | None
    """Folder name and bytes of the newest committed checkpoint."""
    notes: list[str]


def read_run(folder: RunFolder) -> Run:
    """Read a run folder once."""
    notes: list[str] = []
    events = read_records(folder.events)
    return Run(
        name=folder.name,
        plan=facts_in(folder.plan, notes),
        outcome=facts_in(folder.outcome, notes),
        baseline=facts_in(folder.baseline, notes),
        teacher=facts_in(folder.teacher, notes),
        steps=read_steps(folder.steps),
        all_steps=read_records(folder.steps),
        evals=read_steps(folder.evals),
        events=[e for e in events if finite(e.get("time")) is not None and "kind" in e],
        job_text=folder.spec.read_text("utf-8", "replace") if folder.spec.exists() else "",
        checkpoint=_newest_checkpoint(folder.checkpoints),
        notes=notes,
    )


def facts_in(path: Path, notes: list[str]) -> Facts:
    """A JSON object; empty where the file is missing or, with a note, where it cannot be read."""
    try:
        found = read_json(path)
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if found is not None and not isinstance(found, dict):
        notes.append(f"{path.name} holds {type(found).__name__} instead of an object")
    return found if isinstance(found, dict) else {}


def _newest_checkpoint(folder: Path) -> tuple[str, int] | None:
    names = sorted(path.parent.name for path in folder.glob("step-*/COMMIT.json"))
    if not names:
        return None
    sizes = (path.stat().st_size for path in (folder / names[-1]).rglob("*") if path.is_file())
    return names[-1], sum(sizes)


def best_eval(run: Run) -> tuple[str, Facts | None]:
    """(the metric that chooses the model, the record of the best evaluation)."""
    known = run.outcome.get("best") or (run.evals[-1] if run.evals else {})
    asked = ((run.plan.get("spec") or {}).get("evaluation") or {}).get("metric")
    # a task's default metric is not among the plan's fields
    name = run.plan.get("metric") or asked or ("accuracy" if "accuracy" in known else "loss")
    if run.outcome.get("best"):
        return name, run.outcome["best"]
    score = Metric.named(name).score
    usable = [r for r in run.evals if finite(r.get(name)) is not None]
    return name, max(usable, key=lambda r: score(r[name]), default=None)


def steps_done(run: Run) -> int:
    """Steps that count, whatever was replayed."""
    recorded = run.steps[-1]["step"] if run.steps else 0
    return int(finite(run.outcome.get("step")) or recorded)
