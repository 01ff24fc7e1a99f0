"""Figures for other tools: TensorBoard always, MLflow where the job asks, Prometheus on a cluster."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.report.gauges import Gauges
from orchestrator.report.records import Tail
from orchestrator.run_folder import RunFolder

STEP_FIGURES = ("loss", "lr", "grad_norm", "step_s", "tokens", "memory_bytes")


class Tracker:
    """Copies records from the run folder; runs in the driver, so that workers pay nothing for it.

    `on_cluster`: also to the cluster's metrics; a Ray of our own has no agent that would offer them.
    """

    def __init__(
        self, folder: RunFolder, mlflow_uri: str | None, project: str, on_cluster: bool = False
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder.tensorboard))
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
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.end_run()

    def _write(self, group: str, record: dict[str, Any], figures: dict[str, Any]) -> None:
        present = {k: v for k, v in figures.items() if v is not None}
        with contextlib.suppress(OSError):  # a full disk: the run itself says so
            for name, value in present.items():
                tag = f"{group}/{name}"
                self._board.add_scalar(tag, value, record["step"], walltime=record["time"])
        if self._mlflow is not None:
            self._mlflow.log_metrics(
                {f"{group}.{k}": v for k, v in present.items()}, step=record["step"]
            )


def _open_mlflow(folder: RunFolder, uri: str, project: str) -> Any:
    """An MLflow run of this run's name; a resumed run continues its own. Raises OrchestratorError."""
    try:
        import mlflow
    except ImportError as error:
        raise OrchestratorError(
            "tracking.mlflow needs the mlflow extra: pip install 'orchestrator[mlflow]'"
        ) from error
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(project)
    except mlflow.exceptions.MlflowException as error:
        raise OrchestratorError(f"tracking.mlflow = {uri!r}: {error}") from error
    kept: Path = folder.root / "mlflow-run"
    run_id = kept.read_text(encoding="utf-8") if kept.exists() else None
    run = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name)
    kept.write_text(run.info.run_id, encoding="utf-8")
    return mlflow
