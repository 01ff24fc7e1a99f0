"""Check of the disk space for a run's checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from orchestrator.errors import PlanError
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.spec import JobSpec


def check_disk(spec: JobSpec, cluster: Cluster, run_dir: str, checkpoint: int) -> None:
    """Raises PlanError where this machine's disk is the one, and has no room for all that will be kept."""
    free = shutil.disk_usage(_existing_parent(Path(run_dir))).free
    free += _size_bytes(
        Path(run_dir) / "checkpoints"
    )  # a run that goes on makes room as it commits
    need = checkpoint * (spec.checkpoint.num_to_keep + 2)
    if need > free and not cluster.is_elsewhere:
        raise PlanError(
            f"checkpoints need up to {need / GIB:.2f} GiB ({spec.checkpoint.num_to_keep} kept, the best, one being "
            f"written); {run_dir} has {free / GIB:.2f} GiB free. Free some, lower checkpoint.num_to_keep, "
            "or set storage_path."
        )


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be tidying up
            total += path.stat().st_size if path.is_file() else 0
    return total


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
