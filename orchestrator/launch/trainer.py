"""A Ray Train run in the product's settings, for one job and for a sweep's slots alike.

Imported only after `ray_session` has set Ray's variables.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from orchestrator.launch.session import attached_address
from orchestrator.plan.resources import Workers


class Backend(_TorchBackend):
    """Ray Train's, for a group of which a worker has been killed.

    Ray Train leaves the process group on all workers before it starts them again, and expects some of them
    to be dead. One that Ray's memory monitor killed answers with another error (OutOfMemoryError), which
    Ray 2.60 lets through: the run would end, however many restarts it has left.
    """

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with contextlib.suppress(RayError):
            super().on_shutdown(worker_group, backend_config)


class GroupConfig(TorchConfig):
    """Names the backend above."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


class Trainer(TorchTrainer):
    """Ray Train's, without the processes that have nothing to do here.

    The manager of `datasets=`, which are never given, would start anew with every worker group; what
    cleans up after a dead driver is of no use where Ray ends with the driver. Each takes 1 to 2 seconds
    of a core just when the workers start. The hook is that of Ray 2.60.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if not attached_address():
            idle = (*idle, PlacementGroupCleanerCallback)
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in made if not isinstance(one, idle)]


def make_group(
    name: str,
    run: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    workers: Workers,
    storage: Path,
    max_failures: int,
    health_timeout_s: float,
    size: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """A worker group whose workers each `run(config)`; `fit()` runs it.

    `size`: the number of workers in ScalingConfig's words, where it is not fixed. `max_failures`: times
    that Ray Train starts the group again; -1 for any number. `health_timeout_s`: a worker that says
    nothing for so long is taken for dead.
    """
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(health_timeout_s)
    resources = {"CPU": float(workers.cpus)}
    if workers.on_gpu:
        resources["GPU"] = workers.gpus
    return Trainer(
        run,
        train_loop_config=config,
        torch_config=GroupConfig(backend="nccl" if workers.on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            use_gpu=workers.on_gpu,
            resources_per_worker=resources,
            **(size or {"num_workers": workers.count}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
        ),
    )
