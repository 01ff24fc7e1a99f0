"""Ray Tune's side in the driver: a searcher and a scheduler that ask the controller."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.sweep.controller import NO_MORE, SweepController
from orchestrator.sweep.trial_proxy import TrialProxy

NODE_SHARE = 0.0001
"""What a trial proxy asks of the driver's node: Tune refuses a request of nothing. No CPU, of which the
slots may need every one; and no other node, which may go while the driver stays."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # Tune's own state is never read: the log is the truth
    "TUNE_MAX_PENDING_TRIALS_PG": "auto",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_ENABLE_STATE_TRACKING": "0",
}


class LogSearcher(Searcher):
    """Tune's searcher: the next trial is the controller's."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its parts; these have nothing to save."""
        return {}

    def __init__(self, controller: SweepController, broker_name: str) -> None:
        super().__init__()
        self.controller, self.broker_name = controller, broker_name

    def suggest(self, trial_id: str) -> dict[str, Any] | Any:
        trial = self.controller.next_trial()
        if trial is None:
            return None
        if trial is NO_MORE:
            return Searcher.FINISHED
        return {"trial": trial.id, "broker": self.broker_name}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the log knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep asks the log."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class LogScheduler(FIFOScheduler):
    """Tune's scheduler: every report is judged, logged and answered before training goes on."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its parts; these have nothing to save."""
        return {}

    def __init__(self, controller: SweepController) -> None:
        super().__init__()
        self.controller = controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Always CONTINUE: a pruned trial's slot reports its end when it has let go of it."""
        self.controller.reported(json.loads(result["said"]))
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.controller.ended(json.loads(result["said"]))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The trial proxy's own process died: the trial in its slot did not."""
        self.controller.proxy_lost(trial.config["trial"])


def make_tuner(
    controller: SweepController, broker_name: str, storage: Path, in_flight: int
) -> tune.Tuner:
    """Tune over the controller's trials, `in_flight` at a time."""
    os.environ.update(QUIET)
    return tune.Tuner(
        tune.with_resources(TrialProxy, {_this_node(): NODE_SHARE}),
        tune_config=tune.TuneConfig(
            search_alg=LogSearcher(controller, broker_name),
            scheduler=LogScheduler(controller),
            num_samples=-1,
            max_concurrent_trials=in_flight,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0),
    )


def _this_node() -> str:
    """The resource that only the driver's node has."""
    mine = ray.get_runtime_context().get_node_id()
    return next(f"node:{n['NodeManagerAddress']}" for n in ray.nodes() if n["NodeID"] == mine)
