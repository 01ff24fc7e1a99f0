"""Damaged files, full disks and missing permissions end in one sentence that names the file and the fix."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_plan import LAPTOP, prepared

from orchestrator.data.manifest import read_manifest
from orchestrator.errors import (
    DamagedFileError,
    OrchestratorError,
    RunExistsError,
    StorageError,
    TrainingError,
)
from orchestrator.launch import run_lock
from orchestrator.launch.run import _is_over, _safe_to_repeat
from orchestrator.launch.run_lock import at_saved_stage, locked
from orchestrator.launch.session import LogFile
from orchestrator.model.build import build_model
from orchestrator.plan import Plan, make_plan
from orchestrator.report.html import write_report
from orchestrator.report.records import read_records, read_steps
from orchestrator.report.runs import runs_table
from orchestrator.report.sweep_html import write_sweep_report
from orchestrator.report.tracking import Tracker
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import (
    RunFolder,
    SweepFolder,
    read_json,
    read_object,
    read_outcome,
    write_atomically,
    write_json,
)
from orchestrator.train import export
from orchestrator.train.checkpoint import Committed
from orchestrator.train.export import DETAILS, load_exported, load_plan
from orchestrator.train.reference import _read, _write

OUTCOME = {
    "status": "finished", "step": 4, "message": "", "best": {"step": 4, "loss": 0.5, "rows": 2},
    "last_eval": {"step": 4, "loss": 0.5, "rows": 2}, "facts": {"elapsed_s": 1.5, "out_of_time": True},
}  # fmt: skip
EDITED = ("[]", "null", "7", "{}", "{")
STEP = {
    "step": 1, "time": 2.0, "loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 8, "rows": 2,
    "step_s": 0.1, "wait_s": 0.0, "memory_bytes": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    spec = tiny.job(models.bert, rows, folder, stop={"max_steps": 4})
    return make_plan(spec, LAPTOP, prepared(rows=8), folder)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> RunFolder:
    """The folder of a run that ended."""
    made = RunFolder(tmp_path / "runs" / "one")
    write_json(made.plan, plan.model_dump(mode="json"))
    write_atomically(made.spec, "name: one\n")
    write_json(made.outcome, OUTCOME)
    write_json(made.baseline, {"name": "mean", "train_rows": 2, "metrics": {"loss": 0.7}})
    write_atomically(made.steps, json.dumps(STEP) + "\n")
    evaluation = {**OUTCOME["best"], "time": 3.0, "eval_s": 0.1}  # type: ignore[dict-item]
    write_atomically(made.evals, json.dumps(evaluation) + "\n")
    events = [{"time": 1.0, "kind": "launch", "workers": 1}, {"time": 4.0, "kind": "end"}]
    write_atomically(made.events, "".join(json.dumps(e) + "\n" for e in events))
    return made


def show(folder: RunFolder) -> None:
    """Write the report and the table of runs."""
    write_report(folder)
    runs_table(folder.root.parent)


def mutilated(whole: str) -> Iterator[str]:
    """Texts that a torn write, a damaged disk or an editor may leave of `whole`."""
    yield from (whole[:end] for end in range(0, len(whole), 50))
    yield from (*EDITED, '"text"', "true", "[" * 100_000, "\x00" * 8, "{'a': 1}")


def with_wrong_types(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record with one value after another replaced by one of another type, or missing."""
    for name in record:
        for wrong in (None, [], {}, "text", -1.5, 10**30, True):
            yield {**record, name: wrong}
        yield {k: v for k, v in record.items() if k != name}


def never_raw(call: Callable[[], Any], path: Path) -> None:
    """The call may end well, or in an error of the product that names the file."""
    said = str(path)
    try:
        call()
    except OrchestratorError as error:
        said = str(error)
    assert str(path) in said


def resume(plan: Plan, folder: RunFolder) -> None:
    """What a launch reads before it starts workers."""
    here = plan.model_copy(update={"run_dir": str(folder.root)})
    with locked(at_saved_stage(here), fresh=False) as found:
        _is_over(read_outcome(found), plan.spec)


def test_a_mutilated_plan_is_named_by_every_reader(plan: Plan, folder: RunFolder) -> None:
    whole = folder.plan.read_text()
    for text in mutilated(whole):
        folder.plan.write_text(text)
        with pytest.raises(DamagedFileError, match=r"plan\.json"):
            load_plan(folder)
        with pytest.raises((DamagedFileError, RunExistsError)):
            resume(plan, folder)
    for text in (whole[:700], *EDITED):
        folder.plan.write_text(text)
        show(folder)


def test_wrong_types_in_a_plan_are_no_raw_errors(plan: Plan, folder: RunFolder) -> None:
    whole = json.loads(folder.plan.read_text())
    for record in with_wrong_types(whole):
        write_json(folder.plan, record)
        never_raw(lambda: load_plan(folder), folder.plan)
        never_raw(lambda: resume(plan, folder), folder.root)
        write_json(folder.plan, whole)
    for name in (
        "spec",
        "model",
        "memory_bytes",
        "total_steps",
        "planned_rates",
        "labels",
        "reasons",
    ):
        for wrong in ("text", -1.5):
            write_json(folder.plan, {**whole, name: wrong})
            show(folder)


def test_a_mutilated_outcome_is_named(folder: RunFolder) -> None:
    for text in mutilated(folder.outcome.read_text()):
        folder.outcome.write_text(text)
        with pytest.raises(DamagedFileError, match=r"outcome\.json"):
            read_outcome(folder)
    for text in EDITED:
        folder.outcome.write_text(text)
        show(folder)


def test_wrong_types_in_an_outcome_are_no_raw_errors(plan: Plan, folder: RunFolder) -> None:
    for record in with_wrong_types(OUTCOME):
        write_json(folder.outcome, record)
        never_raw(lambda: _is_over(read_outcome(folder), plan.spec), folder.outcome)
    for name in OUTCOME:
        write_json(folder.outcome, {**OUTCOME, name: -1.5})
        show(folder)


@pytest.mark.parametrize("name", ["baseline", "teacher"])
def test_mutilated_figures_harm_no_report(name: str, folder: RunFolder) -> None:
    path: Path = getattr(folder, name)
    whole = {"name": "mean", "train_rows": 2, "metrics": {"loss": 0.7}, "teacher": {"metrics": {}},
             "student": {"metrics": {}}}  # fmt: skip
    for text in EDITED:
        path.write_text(text)
        show(folder)
    for field in whole:
        write_json(path, {**whole, field: "text"})
        show(folder)


@pytest.mark.parametrize("name", ["steps", "evals", "events"])
def test_mutilated_records_are_passed_over(name: str, folder: RunFolder) -> None:
    path: Path = getattr(folder, name)
    lines = path.read_text()
    record = json.loads(lines.splitlines()[0])
    broken = [*mutilated(lines.strip()), *(json.dumps(r) for r in with_wrong_types(record))]
    for text in broken:
        path.write_text(f"{text}\n{lines}{text[:20]}")  # in the middle, and a torn last line
        assert {json.dumps(r) for r in read_records(path)} >= set(lines.splitlines())
        read_steps(path)
    for wrong in ("text", None):
        path.write_text("".join(json.dumps({**record, field: wrong}) + "\n" for field in record))
        show(folder)


def test_a_mutilated_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    whole = prepared()["train"].manifest.model_dump(mode="json")
    write_json(path, whole)
    assert read_manifest(tmp_path) is not None
    for text in mutilated(path.read_text()):
        path.write_text(text)
        never_raw(lambda: read_manifest(tmp_path), path)
    for record in with_wrong_types(whole):
        write_json(path, record)
        never_raw(lambda: read_manifest(tmp_path), path)


def test_a_mutilated_export_is_named(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / DETAILS
    whole = {"plan": plan.model_dump(mode="json"), "step": 4, "best": None}
    for text in mutilated(json.dumps(whole)):
        path.write_text(text)
        with pytest.raises(OrchestratorError, match=DETAILS):
            load_exported(tmp_path)


def test_mutilated_sweep_files_are_passed_over_or_named(plan: Plan, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "runs" / "sweep")
    base = plan.model_dump(mode="json")
    whole = {"spec": base["spec"], "base": base, "milestones": [2.0], "slots": 1}
    trial = {"time": 1.0, "kind": "trial", "trial": "t00000", "index": 0, "values": {"seed": 1},
             "parent": None}  # fmt: skip
    report = {"time": 2.0, "kind": "report", "trial": "t00000", "step": 2, "key": 2.0,
              "metrics": {"loss": 0.5}, "go_on": True, "save": True}  # fmt: skip
    lines = f"{json.dumps(trial)}\n{json.dumps(report)}\n"
    write_json(folder.plan, whole)
    write_atomically(folder.log, lines)
    for text in mutilated(folder.plan.read_text()):
        folder.plan.write_text(text)
        never_raw(lambda: read_object(folder.plan, {"spec": dict, "base": dict}), folder.plan)
        open_log(folder)
    for text in EDITED:
        folder.plan.write_text(text)
        write_sweep_report(folder)
        runs_table(folder.root.parent)
    write_json(folder.plan, whole)
    broken = [*mutilated(lines.strip()), *(json.dumps(r) for r in with_wrong_types(report))]
    for text in broken:
        folder.log.write_text(f"{lines}{text}\n{text[:20]}")
        assert 2 in open_log(folder).trials["t00000"].reports
    write_sweep_report(folder)


def test_a_file_that_is_gone_is_no_damaged_one(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    assert read_object(tmp_path / "none.json") is None
    assert read_outcome(RunFolder(tmp_path)) is None


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: the kernel then refuses writes as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with files_limited_to(100), pytest.raises(StorageError, match=r"file\.json") as caught:
        write_atomically(path, b"x" * 1000)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert read_json(path) == {"a": 1}


def test_a_file_with_a_very_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_json(path, 1)
    assert read_json(path) == 1


def test_a_report_that_cannot_be_written_says_what_is_safe(folder: RunFolder) -> None:
    folder.reserve.write_bytes(bytes(2**20))
    with (
        files_limited_to(1000),
        pytest.raises(TrainingError, match="checkpoints are in") as caught,
        _safe_to_repeat(folder, OUTCOME),
    ):
        write_report(folder)
    assert str(folder.report) in str(caught.value)
    assert not folder.reserve.exists(), "its space is free"
    assert not list(folder.root.rglob("*.tmp"))


def test_a_report_follows_from_the_space_that_was_held_back(folder: RunFolder) -> None:
    folder.reserve.write_bytes(bytes(2**20))
    with pytest.raises(TrainingError), _safe_to_repeat(folder, OUTCOME):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert folder.report.exists()


def test_an_export_that_cannot_be_written_leaves_nothing(
    plan: Plan, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Committed(folder.checkpoints / "step-00000004-a", {"step": 4})
    monkeypatch.setattr(export, "best_checkpoint", lambda *_: here)
    monkeypatch.setattr(export, "load_weights", lambda plan, _: build_model(plan.spec, plan.labels))
    before = sorted(p.name for p in folder.root.iterdir())
    for size in (500, 20_000):  # config.json is torn, then the weights
        with files_limited_to(size), pytest.raises(StorageError, match="export"):
            export.export_run(plan, folder, folder.export, {"best": None})
        assert sorted(p.name for p in folder.root.iterdir()) == before
    export.export_run(plan, folder, folder.export, {"best": None})
    assert (folder.export / "model.safetensors").exists()


def test_a_claim_on_a_full_disk_is_refused_and_takes_no_space(plan: Plan, tmp_path: Path) -> None:
    here = plan.model_copy(update={"run_dir": str(tmp_path / "run")})
    with (
        files_limited_to(2**19),
        pytest.raises(OrchestratorError, match="cannot be written"),
        locked(here, fresh=False),
    ):
        pass
    assert not RunFolder(tmp_path / "run").reserve.exists()


def test_a_claim_gives_back_its_reserve_and_removes_what_killed_processes_left(
    plan: Plan, tmp_path: Path
) -> None:
    here = plan.model_copy(update={"run_dir": str(tmp_path / "run")})
    folder = RunFolder(tmp_path / "run")
    old, new = folder.root / ".report.html.17.tmp", folder.root / ".plan.json.18.tmp"
    half = folder.root / ".export-ab12"
    half.mkdir(parents=True)
    for path in (old, new, half / "model.safetensors"):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * run_lock.STALE_S
    for path in (old, half):
        os.utime(path, (long_ago, long_ago))
    with locked(here, fresh=False):
        assert folder.reserve.exists()
        assert not old.exists()
        assert not half.exists()
        assert new.exists(), "another process may be writing it"
    assert not folder.reserve.exists()


@pytest.mark.parametrize("size", [0, 10, 200])
def test_figures_that_cannot_be_written_do_not_end_a_run(size: int, folder: RunFolder) -> None:
    with files_limited_to(size):
        tracker = Tracker(folder, None, "project")
        tracker.update([STEP] * 50)
        tracker.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permissions_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"report\.html"):
        write_atomically(tmp_path / "report.html", "x")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"report\.html"):
        write_atomically(tmp_path / "file" / "report.html", "x")


def test_a_torn_file_of_an_export_is_named(plan: Plan, models: tiny.Tiny, tmp_path: Path) -> None:
    target = Path(shutil.copytree(models.bert, tmp_path / "export"))
    write_json(target / DETAILS, {"plan": plan.model_dump(mode="json"), "step": 4})
    load_exported(target)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        whole = (target / name).read_bytes()
        for torn in (whole[: len(whole) // 2], b"", None):
            (target / name).unlink() if torn is None else (target / name).write_bytes(torn)
            if torn is not None or name == "model.safetensors":
                with pytest.raises(OrchestratorError, match="export"):
                    load_exported(target)
            (target / name).write_bytes(whole)


def test_damaged_answers_of_a_reference_model_are_computed_again(
    plan: Plan, tmp_path: Path
) -> None:
    kept = tmp_path / "train.npz"
    assert _read(kept, plan.train_data) is None
    _write(kept, plan.train_data, {"logprob": np.arange(100.0)})
    whole = kept.read_bytes()
    found = _read(kept, plan.train_data)
    assert found is not None
    assert found["logprob"].tolist() == list(range(100))
    for torn in (b"", whole[:50], whole[:-30], b"text", whole[:200] + b"\xff" + whole[201:]):
        kept.write_bytes(torn)
        assert _read(kept, plan.train_data) is None


def test_a_log_file_on_a_full_disk_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = LogFile(tmp_path / "driver.log")
    with files_limited_to(10):
        log.handle(logging.makeLogRecord({"msg": "x" * 100}))
    log.close()
    assert capsys.readouterr().err == ""
