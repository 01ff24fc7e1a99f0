"""Runs of earlier versions: their folders still load, report, predict and resume.

`stored/format_1.tar.gz` holds a run and a sweep from before job fields were renamed, trained on the text
and the model beside them.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api import predict
from orchestrator.errors import SpecError
from orchestrator.launch.run import train
from orchestrator.renames import FIELDS, upgraded_plan, with_new_names
from orchestrator.report.html import write_report
from orchestrator.report.records import read_records
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import RunFolder, SweepFolder, read_json
from orchestrator.spec import load_spec, parse_spec
from orchestrator.sweep.run import sweep
from orchestrator.train.export import load_plan

STORED = Path(__file__).parent / "stored"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the job files, the model, the text and the runs of format 1, as the working directory."""
    with tarfile.open(STORED / "format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def renamed_job(file: Path) -> Path:
    """Write the job with today's names beside the old one."""
    job, _ = with_new_names(yaml.safe_load(file.read_text()))
    new = file.with_name(f"new-{file.name}")
    new.write_text(yaml.safe_dump(job))
    return new


def test_a_job_with_old_names_gets_every_new_name_at_once(project: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(project / "sweep.yaml")
    fixes = {problem.field: problem.fix for problem in caught.value.problems}
    assert fixes == {
        "batch.micro_rows": "write batch.micro_batch_size",
        "checkpoint.keep": "write checkpoint.num_to_keep",
        "data.over_long": "write data.truncation",
        "faults.max_restarts": "write fault_tolerance.max_failures",
        "faults": "write fault_tolerance",
        "regularisation.token_masking": "write regularization.token_dropout",
        "regularisation": "write regularization",
        "storage": "write storage_path",
        "sweep.scheduler.min": "write sweep.scheduler.grace_period",
        "sweep.slots": "write sweep.max_concurrent_trials",
        "sweep.space.batch.global_rows": "write batch.global_batch_size",
        "sweep.constraints.0": "write optimizer.lr * batch.global_batch_size < 1.0",
    }


def test_other_problems_are_found_beside_old_names() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(
            {"name": "x", "storage": "runs", "batch": {"micro_rows": 0}, "seed": -1}, files="there"
        )
    fields = {problem.field for problem in caught.value.problems}
    assert {
        "storage",
        "batch.micro_rows",
        "batch.micro_batch_size",
        "seed",
        "task",
        "model",
        "data",
    } <= fields


@pytest.mark.parametrize("old", FIELDS)
def test_every_old_name_leads_to_a_field(old: str) -> None:
    given: dict[str, Any] = {}
    here = given
    *sections, name = old.split(".")
    for section in sections:
        here = here.setdefault(section, {})
    here[name] = "value"
    new, found = with_new_names(given)
    assert found[old] == FIELDS[old]
    at: Any = new
    for part in FIELDS[old].split("."):
        at = at[part]
    assert at == "value"
    assert with_new_names(new) == (new, {}), "new names stay"


def test_a_plan_of_the_first_format_is_read_as_todays(project: Path) -> None:
    folder = RunFolder(project / "runs" / "old")
    written = json.loads(folder.plan.read_text())
    assert "format_version" not in written
    plan = load_plan(folder)
    assert (plan.format_version, plan.global_batch_size, plan.micro_batch_size) == (2, 8, 4)
    assert plan.spec.fault_tolerance.max_failures == 2
    assert plan.spec.data.truncation == "error"
    again = json.loads(plan.model_dump_json())
    assert upgraded_plan(again) == again


def test_a_stored_run_reports_and_predicts(project: Path) -> None:
    folder = RunFolder(project / "runs" / "old")
    assert write_report(folder).stat().st_size > 0
    text = json.loads((project / "eval.jsonl").read_text().splitlines()[0])["text"]
    (answer,) = predict(folder, [text])
    assert answer["label"] in load_plan(folder).labels


def test_a_stored_run_resumes_from_its_checkpoint(project: Path, ray: Any) -> None:
    folder = RunFolder(project / "runs" / "old")
    before = [record for record in read_records(folder.evals) if record["step"] == 8]
    for late in folder.checkpoints.glob("step-00000008-*"):
        shutil.rmtree(late)
    shutil.rmtree(folder.export)
    folder.outcome.unlink()
    outcome = train(load_spec(renamed_job(project / "job.yaml")))
    assert outcome.status == "finished"
    starts = [r for r in read_records(folder.events) if r["kind"] == "stream"]
    assert starts[-1]["step"] == 4, "it begins at the stored checkpoint"
    after = [record for record in read_records(folder.evals) if record["step"] == 8]
    assert after[-1]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-4)
    assert read_json(folder.plan)["format_version"] == 2


def test_a_stored_sweep_goes_on(project: Path, ray: Any) -> None:
    folder = SweepFolder(project / "runs" / "old-sweep")
    old = {t.id: t.reports for t in open_log(folder).trials.values()}
    assert {key for t in open_log(folder).trials.values() for key in t.values} == {
        "batch.global_batch_size",
        "optimizer.lr",
    }
    spec = load_spec(renamed_job(project / "sweep.yaml"), ["sweep.num_trials=3"])
    outcome = sweep(spec)
    assert outcome.status == "finished"
    trials = {t.id: t.reports for t in open_log(folder).trials.values()}
    assert len(trials) == 3
    assert {name: trials[name] for name in old} == old
