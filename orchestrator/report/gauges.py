"""A run's or sweep's latest figures as Ray metrics, which Ray's agents offer to Prometheus under `ray_…`."""

from __future__ import annotations

from typing import Any

from orchestrator.report.trial_log import SweepLog

STEP_GAUGES = {
    "step": ("orchestrator_step", "Optimizer steps done."),
    "loss": ("orchestrator_loss", "Loss of the last step, the mean over its targets."),
    "lr": ("orchestrator_learning_rate", "Learning rate of the last step."),
    "grad_norm": ("orchestrator_gradient_norm", "Gradient norm of the last step, before clipping."),
    "step_s": ("orchestrator_step_seconds", "Seconds of the last step."),
    "wait_s": ("orchestrator_wait_seconds", "Seconds of it that rank 0 waited for rows."),
    "memory_bytes": (
        "orchestrator_memory_bytes",
        "Memory in use by rank 0, of its GPU or its process.",
    ),
}
"""Field of a step's record → metric and meaning."""
TOKENS_GAUGE = ("orchestrator_tokens_per_second", "Useful tokens of the last step per second.")
EVAL_GAUGE = ("orchestrator_evaluation", "Latest evaluation; the label `metric` says of what.")

SWEEP_GAUGES = {
    "ended": ("orchestrator_trials_ended", "Trials of the sweep that have ended."),
    "running": ("orchestrator_trials_running", "Trials that have begun and not ended."),
    "failed": ("orchestrator_trials_failed", "Trials that ended without a result."),
    "best": ("orchestrator_best_trial", "The sweep's metric, of its best trial so far."),
}


def metric_names() -> set[str]:
    """As Prometheus sees them."""
    ours = [name for name, _ in (*STEP_GAUGES.values(), *SWEEP_GAUGES.values())]
    return {f"ray_{name}" for name in (*ours, TOKENS_GAUGE[0], EVAL_GAUGE[0])}


class Gauges:
    """Each holds the last value it was told, labeled with the run's name. Needs a running Ray."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = {"run": run}
        self._steps = {
            field: Gauge(name, description=meaning, tag_keys=("run",))
            for field, (name, meaning) in STEP_GAUGES.items()
        }
        self._tokens = Gauge(TOKENS_GAUGE[0], description=TOKENS_GAUGE[1], tag_keys=("run",))
        self._evals = Gauge(EVAL_GAUGE[0], description=EVAL_GAUGE[1], tag_keys=("run", "metric"))

    def step(self, record: dict[str, Any]) -> None:
        """The record of the newest step."""
        for field, gauge in self._steps.items():
            if isinstance(record.get(field), int | float):
                gauge.set(record[field], tags=self._run)
        if record.get("step_s"):
            self._tokens.set(record["tokens"] / record["step_s"], tags=self._run)

    def evaluation(self, figures: dict[str, float]) -> None:
        """An evaluation's metrics by name."""
        for name, value in figures.items():
            self._evals.set(value, tags={**self._run, "metric": name})


class SweepGauges:
    """The same for a sweep: `run` is its name."""

    def __init__(self, sweep: str) -> None:
        from ray.util.metrics import Gauge

        self._sweep = {"run": sweep}
        self._gauges = {
            figure: Gauge(name, description=meaning, tag_keys=("run",))
            for figure, (name, meaning) in SWEEP_GAUGES.items()
        }

    def told(self, log: SweepLog) -> None:
        """Return the current state from the log."""
        statuses = [trial.status for trial in list(log.trials.values())]
        figures = {
            "ended": sum(status is not None for status in statuses),
            "running": statuses.count(None),
            "failed": sum(status in ("failed", "diverged") for status in statuses),
        }
        best = log.best()
        for figure, value in {**figures, **({"best": best.best} if best else {})}.items():
            if value is not None:
                self._gauges[figure].set(value, tags=self._sweep)
