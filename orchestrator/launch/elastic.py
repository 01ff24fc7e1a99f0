"""A worker group that follows the cluster: what Ray Train's elastic runs do not do by themselves.

Ray Train decides when to change the number of workers and does so at once, losing the steps since the
last checkpoint. Here the workers are asked to commit one first. Callbacks that are not `UserCallback`s
are handed to Ray's controller as they are (`DataParallelTrainer._create_default_callbacks`); the hooks
are those of Ray 2.60.

See docs/decisions/0029-a-checkpoint-is-committed-before-every-resize.md.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
)

from orchestrator.launch.session import TRAIN_SETTINGS
from orchestrator.report.records import append_event
from orchestrator.run_folder import RunFolder

POLL_S = 0.05
LOOK_TIMEOUT_S = 5
SHRINK_PATIENCE_S = 10.0
"""A smaller size mostly means that a node is gone, and its workers with it: they will not commit."""
START_TIMEOUT_S = "10"
"""How long a group of another size waits for its place. Ray chose the size by the nodes it knew; where one
of them is gone, waiting longer does not bring it back."""


class FollowCluster(ControllerCallback):  # type: ignore[misc]  # Ray's internals are not typed
    """Runs in Ray Train's controller."""

    def __init__(self, folder: RunFolder, patience_s: float) -> None:
        self.folder, self.patience_s = folder, patience_s
        self.num_workers = 0

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called for every group that starts."""
        self.num_workers = resize_decision.num_workers

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Act before a healthy group is replaced, and before a broken one is."""
        match current_state:
            case ResizingState():
                self._commit_first(current_state.scaling_decision)
            case RestartingState() | ReschedulingState():
                look_at_nodes()

    def _commit_first(self, decision: Any) -> None:
        """Ask the workers to commit and wait for it, but no longer than a hanging worker is waited for.

        The controller polls nothing meanwhile; the workers do not need it.
        """
        grows = decision.num_workers > self.num_workers
        patience_s = self.patience_s if grows else min(self.patience_s, SHRINK_PATIENCE_S)
        deadline = time.monotonic() + patience_s
        with contextlib.suppress(OSError):  # what is raised here would end the run
            append_event(self.folder.events, "resize", workers=decision.num_workers)
            self.folder.handover_request.touch()
            while time.monotonic() < deadline and self._is_open():
                time.sleep(POLL_S)
            self.folder.handover_request.unlink(missing_ok=True)

    def _is_open(self) -> bool:
        """Tell whether the workers still have to commit: they take the request away, or end the run."""
        return self.folder.handover_request.exists() and not self.folder.outcome.exists()


def look_at_nodes() -> None:
    """Have Ray look at the cluster now: by itself it does so every 20 s, and counts on lost nodes till then."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        coordinator: Any = get_or_create_autoscaling_coordinator()
        look = coordinator.get_reserved_resources.remote("orchestrator", recompute=True)
        ray.get(look, timeout=LOOK_TIMEOUT_S)


def shorten_start_timeout() -> None:
    """Unless the environment says something else than what fixed groups get."""
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    if os.environ.get(name) == TRAIN_SETTINGS[name]:
        os.environ[name] = START_TIMEOUT_S
