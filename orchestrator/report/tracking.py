"""Figures for other tools: TensorBoard always, MLflow where the job asks, Prometheus on a cluster."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.product import install_hint
from orchestrator.report.gauges import Gauges
from orchestrator.report.records import Tail, append_event
from orchestrator.run_folder import RunFolder, write_atomically

STEP_FIGURES = ("loss", "lr", "grad_norm", "step_s", "tokens", "memory_bytes")


class Tracker:
    """Copies records from the run folder; runs in the driver, so that workers pay nothing for it.

    `on_cluster`: also to the cluster's metrics; a Ray of our own has no agent that would offer them.
    """

    def __init__(
        self, folder: RunFolder, mlflow_uri: str | None, project: str, on_cluster: bool = False
    ) -> None:
        self._board = _open_board(folder)
        self._events = folder.events
        self._evals = Tail(folder.evals, from_end=True)
        self._mlflow = _open_mlflow(folder, mlflow_uri, project) if mlflow_uri else None
        self._gauges = Gauges(folder.name) if on_cluster else None

    def update(self, steps: list[dict[str, Any]]) -> None:
        """Pass on new step records, and whatever was evaluated since the last call."""
        for record in steps:
            self._write("train", record, {k: record.get(k) for k in STEP_FIGURES})
        for record in self._evals.read():
            figures = {k: v for k, v in record.items() if isinstance(v, float) and k != "time"}
            self._write("eval", record, figures)
            if self._gauges:
                self._gauges.evaluation(figures)
        if self._gauges and steps:
            self._gauges.step(steps[-1])

    def close(self) -> None:
        """Flush and end."""
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        if self._mlflow is not None:
            self._mlflow.end_run()

    def _write(self, group: str, record: dict[str, Any], figures: dict[str, Any]) -> None:
        present = {k: v for k, v in figures.items() if v is not None}
        self._draw(group, record, present)
        if self._mlflow is not None:
            self._mlflow.log_metrics(
                {f"{group}.{k}": v for k, v in present.items()}, step=record["step"]
            )

    def _draw(self, group: str, record: dict[str, Any], figures: dict[str, Any]) -> None:
        """Add figures to TensorBoard, until its file cannot be written: figures are not worth a run."""
        try:
            if self._board is not None:
                named = {f"{group}/{name}": float(value) for name, value in figures.items()}
                self._board.add(named, int(record["step"]), float(record["time"]))
        except OSError as error:
            self._board = None
            append_event(self._events, "warning", text=f"TensorBoard's file is incomplete: {error}")


class Board:
    """A TensorBoard event file, written synchronously.

    TensorBoard's own writer uses a thread; on a full disk it dies with a traceback, and whoever waits for
    its queue waits for ever. Only its record format is used here.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = (
            f"events.out.tfevents.{int(now)}.{platform.node()}.{os.getpid()}.{uuid.uuid4().hex[:6]}"
        )
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())

    def add(self, figures: dict[str, float], step: int, time_s: float) -> None:
        """Write figures by tag; raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        event = Event(wall_time=time_s, step=step, summary=Summary(value=values))
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_board(folder: RunFolder) -> Board | None:
    """Return the run's TensorBoard file, or None, with a warning, where it cannot be written."""
    try:
        return Board(folder.tensorboard)
    except OSError as error:
        text = f"{folder.tensorboard} cannot be written: {error.strerror}. TensorBoard gets no figures."
        append_event(folder.events, "warning", text=text)
        return None


def _open_mlflow(folder: RunFolder, uri: str, project: str) -> Any:
    """An MLflow run of this run's name; a resumed run continues its own. Raises OrchestratorError."""
    try:
        import mlflow
    except ImportError as error:
        raise OrchestratorError(
            f"tracking.mlflow needs the mlflow extra: {install_hint('mlflow')}"
        ) from error
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(project)
    except mlflow.exceptions.MlflowException as error:
        raise OrchestratorError(f"tracking.mlflow = {uri!r}: {error}") from error
    kept: Path = folder.root / "mlflow-run"
    run_id = kept.read_text(encoding="utf-8") if kept.exists() else None
    run = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name)
    with contextlib.suppress(OSError):  # a full disk: the run itself says so
        write_atomically(kept, run.info.run_id)
    return mlflow
