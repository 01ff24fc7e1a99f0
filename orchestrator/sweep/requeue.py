"""A slot that has lost its workers gives its trial back at once: its node may never return.

Callbacks that are not `UserCallback`s are handed to Ray Train's controller as they are; the hooks are
those of Ray 2.60.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class RequeueCallback(WorkerGroupCallback):  # type: ignore[misc]  # Ray's internals are not typed
    """Runs in Ray Train's controller."""

    def __init__(self, broker_name: str, slot: int) -> None:
        self.broker_name, self.slot = broker_name, slot

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """All workers of the slot are gone, before any other ones are asked for."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            broker: Any = ray.get_actor(self.broker_name)
            ray.get(broker.lost.remote(self.slot))

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """The same, where the group did not end by itself."""
        self.after_worker_group_shutdown(worker_group_context)
