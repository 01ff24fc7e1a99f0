"""Plan → Ray Train: the worker group, and what each worker runs."""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, StorageError
from orchestrator.launch.repeated_failures import record_failure, repeated_failure
from orchestrator.launch.session import LogFile, keep_ray_data_quiet
from orchestrator.plan.plan import Plan
from orchestrator.report.records import append_event
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.spec.job import WorkerRange


def make_trainer(plan: Plan, launch_id: str) -> Any:
    """A Ray Train run of this plan. Its name is new per launch: Ray's own snapshot of an earlier
    launch, which may be torn, is never read. Ours are the checkpoints that count."""
    from orchestrator.launch.trainer import make_group

    size, callbacks = _size(plan)
    return make_group(
        f"launch-{launch_id}",
        work,
        {"plan": plan.model_dump_json()},
        plan.workers,
        Path(plan.run_dir) / "ray",
        plan.spec.fault_tolerance.max_failures,
        plan.spec.fault_tolerance.health_timeout_s,
        size,
        callbacks,
    )


def _size(plan: Plan) -> tuple[dict[str, Any], list[Any]]:
    """(what ScalingConfig is told of the number of workers, the callbacks that this takes)."""
    match plan.spec.resources.num_workers:
        case WorkerRange(min=fewest, max=most, elastic_resize_monitor_interval_s=every_s):
            from orchestrator.launch.elastic import FollowCluster, shorten_start_timeout

            shorten_start_timeout()
            follow = FollowCluster(
                RunFolder(Path(plan.run_dir)), plan.spec.fault_tolerance.health_timeout_s
            )
            looks = {"num_workers": (fewest, most), "elastic_resize_monitor_interval_s": every_s}
            return looks, [follow]
        case _:
            return {}, []


def work(config: dict[str, Any]) -> None:
    """A worker's life: join the group, run the trial, leave its result in the run folder."""
    plan = Plan.model_validate_json(config["plan"])
    folder = RunFolder(Path(plan.run_dir))
    rank = int(os.environ["RANK"])
    enter_work_dir(plan)
    if folder.plan.exists():  # else nothing may be made here
        if rank == 0:
            append_event(folder.events, "imports", workers=int(os.environ["WORLD_SIZE"]))
        log_to(folder.logs / f"worker-{rank:05d}.log")
    import torch

    from orchestrator.train.engine import import_ahead
    from orchestrator.train.group import broadcast, together
    from orchestrator.train.state import Result
    from orchestrator.train.trial import run_trial

    torch.set_num_threads(plan.cpus_per_worker)
    import_ahead()
    try:
        together(lambda: must_see(folder.plan))
        repeated = broadcast(repeated_failure(folder) if rank == 0 else None)
        if repeated:
            result = Result("failed", 0, None, None, repeated)
        else:
            result = run_trial(plan, folder, ask=node_taken_away_at_s)
    except CheckpointError as error:
        if not folder.plan.exists():  # nowhere to leave it: Ray Train takes it to the driver
            raise
        result = Result("failed", 0, None, None, str(error))
    except Exception as error:
        record_failure(error, folder)
        raise
    if rank == 0:
        if result.status == "storage_failed":
            folder.reserve.unlink(missing_ok=True)
        try:
            write_json(folder.outcome, asdict(result))
        except StorageError:  # a full disk: the space for it was held back
            folder.reserve.unlink(missing_ok=True)
            write_json(folder.outcome, asdict(result))


def enter_work_dir(plan: Plan) -> None:
    """Ray starts workers elsewhere; the job's paths are relative to where the driver was."""
    if Path(plan.work_dir).is_dir():
        os.chdir(plan.work_dir)


def must_see(file: Path) -> None:
    """Raises CheckpointError where this node does not see a file that the driver left in its folder.

    Making the folder here would train into one that nobody finds again.
    """
    if not file.exists():
        raise CheckpointError(
            f"{file.parent} is not there on node {platform.node()}: storage must be a folder that every node "
            "sees. Mount it there, or set storage_path=… to one that is; then run the same command again."
        )


def node_taken_away_at_s() -> float | None:
    """Return when a node of this worker group will be drained, in Unix seconds; now where Ray knows no deadline.

    Collective: Ray Train makes all ranks agree.
    """
    from ray.train import get_preemption_info

    info = get_preemption_info()
    if info is None:
        return None
    return info.deadline_ms / 1000 if info.deadline_ms else time.time()


def log_to(path: Path) -> None:
    """Everything that libraries say in this process goes to a file."""
    keep_ray_data_quiet()
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
