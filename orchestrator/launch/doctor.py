"""Checks of this machine or cluster; each shortcoming comes with its fix."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import OrchestratorError

GIB = 2**30
PACKAGES = ("ray", "deepspeed", "torch", "transformers", "pyarrow", "peft")
TESTED = {
    "ray": "2.60",
    "deepspeed": "0.19",
    "torch": "2.13",
    "transformers": "5.23",
    "pyarrow": "26",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's sheet. `fix` is empty where nothing is wrong."""

    what: str
    found: str
    level: Literal["ok", "note", "problem"] = "ok"
    fix: str = ""


def examine(storage: Path = Path("runs")) -> list[Finding]:
    """Everything that is worth knowing before a job is launched here."""
    checks = (
        _python(), _versions(), _combinations(), _cpus(), _memory(), _shared_memory(), _gpus(),
        _compilers(), _disk(storage), _ray(),
    )  # fmt: skip
    return [finding for check in checks for finding in check]


def _python() -> Iterator[Finding]:
    good = sys.version_info[:2] in ((3, 10), (3, 11), (3, 12))
    fix = "" if good else "use Python 3.11"
    yield Finding("python", platform.python_version(), "ok" if good else "problem", fix)


def _versions() -> Iterator[Finding]:
    for package in PACKAGES:
        version = _version(package)
        if version is None:
            yield Finding(package, "not installed", "problem", f"pip install {package}")
        elif package in TESTED and not version.startswith(TESTED[package]):
            fix = f"tests ran with {TESTED[package]}"
            yield Finding(package, version, "note", fix)
        else:
            yield Finding(package, version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _combinations() -> Iterator[Finding]:
    """Pairs that install together and fail together."""
    if _version("ray") and not _version("aiohttp-cors"):
        yield Finding(
            "ray[default]", "missing", "problem",
            "pip install 'ray[default]': without it a head has no Jobs API, and Tune leaks placement groups",
        )  # fmt: skip
    if _version("ray") and not _version("aiohttp"):
        yield Finding(
            "aiohttp",
            "missing",
            "problem",
            "pip install aiohttp: ray.data.read_parquet of lists needs it",
        )
    if os.environ.get("OMP_NUM_THREADS") == "1":
        yield Finding(
            "OMP_NUM_THREADS",
            "1",
            "note",
            "workers set their own thread count; unset it for other tools",
        )


def _cpus() -> Iterator[Finding]:
    count = len(os.sched_getaffinity(0))
    level: Literal["ok", "note"] = "ok" if count >= 2 else "note"
    yield Finding(
        "CPUs", str(count), level, "" if count >= 2 else "two workers will share one core"
    )


def _memory() -> Iterator[Finding]:
    from orchestrator.plan.cluster import memory_limit_bytes

    size = memory_limit_bytes()
    small = size < 4 * GIB
    fix = "a worker needs about 1 GiB before its model" if small else ""
    yield Finding("memory", f"{size / GIB:.1f} GiB", "note" if small else "ok", fix)


def _shared_memory() -> Iterator[Finding]:
    if not os.path.exists("/dev/shm"):
        yield Finding("/dev/shm", "missing", "note", "Ray falls back to /tmp, which is slower")
        return
    usage = shutil.disk_usage("/dev/shm")
    small = usage.total < 2 * GIB
    fix = (
        "containers: run with --shm-size=4g (Kubernetes: an emptyDir with medium: Memory)"
        if small
        else ""
    )
    yield Finding(
        "/dev/shm",
        f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free",
        "problem" if small else "ok",
        fix,
    )


def _gpus() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "GPUs", "nvidia-smi is here, torch sees none", "problem",
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: install one that fits the driver",
            )  # fmt: skip
        else:
            yield Finding("GPUs", "none: workers run on CPU with gloo", "note")
        return
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield Finding(f"GPU {i}", f"{props.name}, {props.total_memory / GIB:.0f} GiB, {bf16}")


def _compilers() -> Iterator[Finding]:
    for tool, why in (
        ("g++", "DeepSpeedCPUAdam"),
        ("ninja", "DeepSpeed's compiled optimizers"),
        ("nvcc", "FusedAdam"),
    ):
        path = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
        if path:
            yield Finding(tool, path)
        elif tool != "nvcc" or _has_gpu():
            yield Finding(
                tool,
                "not found",
                "note",
                f"only needed for {why}; torch's kernels are used instead",
            )


def _has_gpu() -> bool:
    if _version("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _disk(storage: Path) -> Iterator[Finding]:
    place = storage.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    if not writable:
        yield Finding(
            str(place), "not writable", "problem", "set storage_path=… to a folder you can write to"
        )
    low = free < 5 * GIB
    fix = "checkpoints of a 1 B model take about 15 GiB each" if low else ""
    yield Finding(f"disk at {place}", f"{free / GIB:.1f} GiB free", "note" if low else "ok", fix)
    yield from _temporary_disk()


def _temporary_disk() -> Iterator[Finding]:
    from orchestrator.launch.temporary import temporary_root

    try:
        root = temporary_root()
    except OrchestratorError as error:
        yield Finding("folder for Ray", str(error), "problem", "export RAY_TMPDIR=/a/short/folder")
        return
    tmp = shutil.disk_usage(root)
    full = tmp.free / tmp.total < 0.05
    fix = (
        "Ray stops placing objects on a disk that is 95 % full: free some, or set RAY_TMPDIR"
        if full
        else ""
    )
    yield Finding(
        f"disk at {root} (Ray)", f"{tmp.free / GIB:.1f} GiB free", "problem" if full else "ok", fix
    )


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("Ray cluster", "none named: jobs start their own Ray on this machine", "ok")
        return
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001, whatever it is, the sheet shows it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        yield Finding(
            "Ray cluster",
            first,
            "problem",
            f"RAY_ADDRESS={address}: start it or unset the variable",
        )
        return
    from orchestrator.plan.cluster import live_cluster

    yield Finding("Ray cluster", str(live_cluster()))
    ray.shutdown()
