"""Figures for other tools, and where libraries' chatter goes."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.launch.session import send_chatter_to
from orchestrator.product import install_hint
from orchestrator.report.records import RecordWriter
from orchestrator.report.tracking import Tracker
from orchestrator.run_folder import RunFolder


class FakeMLflow(ModuleType):
    """Runs and what was logged to them, by the id that `start_run` gives or is given."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.exceptions = SimpleNamespace(MlflowException=LookupError)
        self.logged: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.place: list[str] = []
        self.ended = 0

    def set_tracking_uri(self, uri: str) -> None:
        if uri.startswith("file:"):  # as MLflow 3 does
            raise self.exceptions.MlflowException("in maintenance mode")
        self.place.append(uri)

    def set_experiment(self, name: str) -> None:
        self.place.append(name)

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        assert (run_id is None) != (run_name is None)
        self.now = run_id or f"{run_name}-{len(self.logged)}"
        self.logged.setdefault(self.now, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.now))

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.logged[self.now].append((step, figures))

    def end_run(self) -> None:
        self.ended += 1


def test_mlflow_gets_steps_and_evaluations_and_a_resumed_run_continues_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    folder = RunFolder(tmp_path / "run")
    evaluations = RecordWriter(folder.evals)
    for step in (1, 2):  # two launches
        tracker = Tracker(folder, "http://mlflow", "project")
        evaluations.write(step=step, accuracy=0.5, rows=8, time=2.0)
        evaluations.flush()
        tracker.update([{"step": step, "loss": 0.25, "lr": 1e-4, "grad_norm": None, "time": 1.0}])
        tracker.close()
    assert mlflow.place == ["http://mlflow", "project"] * 2
    assert mlflow.ended == 2
    assert mlflow.logged == {
        "run-0": [
            (step, figures)
            for step in (1, 2)
            for figures in ({"train.loss": 0.25, "train.lr": 1e-4}, {"eval.accuracy": 0.5})
        ]
    }


def test_a_store_that_mlflow_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())
    with pytest.raises(OrchestratorError, match=r"tracking\.mlflow = 'file:runs': in maintenance"):
        Tracker(RunFolder(tmp_path / "run"), "file:runs", "project")


def test_a_job_that_wants_mlflow_without_it_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(OrchestratorError, match=re.escape(install_hint("mlflow"))):
        Tracker(RunFolder(tmp_path / "run"), "http://mlflow", "project")


def test_what_libraries_say_goes_to_a_file_and_not_to_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "driver.log"
    try:
        send_chatter_to(log)
        for name in ("ray.train", "deepspeed", "transformers"):
            logging.getLogger(name).error("said by %s", name)
    finally:
        send_chatter_to(None)
    logging.getLogger("ray").error("said to nobody")
    said = log.read_text(encoding="utf-8")
    assert all(f"said by {n}" in said for n in ("ray.train", "deepspeed", "transformers"))
    assert "said to nobody" not in said
    assert "said" not in "".join(capfd.readouterr())
