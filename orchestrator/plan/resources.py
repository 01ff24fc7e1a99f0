"""What of the cluster a job gets: workers and their shares, precision, optimizer kernel, memory."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from orchestrator.data.stream import READ_CPUS
from orchestrator.errors import PlanError
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.spec import JobSpec
from orchestrator.spec.job import WorkerRange
from orchestrator.spec.optimizer import SGD, Adafactor, Adam, AdamW, Lion, RMSProp
from orchestrator.spec.tuning import quantized
from orchestrator.spec.tuning_rules import NO_GPU

DATA_CPUS = 2 * READ_CPUS
"""CPUs kept free for Ray Data; without them reads starve and the run hangs without a word."""


@dataclass(frozen=True)
class Workers:
    """How many there are, and what each one gets."""

    count: int
    gpus: float
    cpus: int

    @property
    def on_gpu(self) -> bool:
        return self.gpus > 0


def share_out(spec: JobSpec, cluster: Cluster, reasons: dict[str, str]) -> Workers:
    """The workers; raises PlanError, with a setting that does fit, where they do not."""
    gpus = _gpus_per_worker(spec, cluster, reasons)
    if quantized(spec.tuning) and not gpus:
        raise PlanError(f"tuning.quantization: {NO_GPU}. Drop it, or plan for a cluster with GPUs.")
    count = _num_workers(spec, cluster, gpus, reasons)
    return Workers(count, gpus, _cpus_per_worker(spec, cluster, count, reasons))


def _gpus_per_worker(spec: JobSpec, cluster: Cluster, reasons: dict[str, str]) -> float:
    wanted = spec.resources.gpus_per_worker
    if wanted != "auto":
        return wanted
    reasons["gpus_per_worker"] = f"{cluster.source} has {cluster.gpus:g} GPUs"
    return 1.0 if cluster.gpus else 0.0


def worker_limits(spec: JobSpec, count: int) -> tuple[int, int]:
    """(fewest, most) workers of a job that was planned for `count`; both the same where it is fixed."""
    wanted = spec.resources.num_workers
    return (wanted.min, wanted.max) if isinstance(wanted, WorkerRange) else (count, count)


def _room(spec: JobSpec, cluster: Cluster, gpus: float) -> int:
    """How many workers fit the cluster."""
    if gpus:
        return sum(int(n.gpus) * per_gpu(gpus) for n in cluster.nodes)
    cpus = spec.resources.cpus_per_worker
    if not isinstance(spec.resources.num_workers, int) and cpus != "auto":
        return int(sum(n.cpus // cpus for n in cluster.nodes))
    return int(cluster.cpus)


def _num_workers(spec: JobSpec, cluster: Cluster, gpus: float, reasons: dict[str, str]) -> int:
    most = _room(spec, cluster, gpus)
    wanted = spec.resources.num_workers
    if isinstance(wanted, WorkerRange):
        count = max(wanted.min, min(wanted.max, most))
        reasons["num_workers"] = (
            f"of {wanted.min} to {wanted.max}, what there is room for now; it follows the cluster"
        )
    elif wanted == "auto":
        reasons["num_workers"] = (
            "one per GPU" if gpus else "two on CPU, one where there is one core"
        )
        most = most if gpus else max(1, most)  # no room for one: said with the CPUs it wants
        count = max(1, most if gpus else min(2, most))
    else:
        count = wanted
    if count > most:
        what = f"{gpus:g} GPU each" if gpus else "a CPU each"
        name = "resources.num_workers" + (".min" if isinstance(wanted, WorkerRange) else "")
        raise PlanError(
            f"{name} = {count} with {what} does not fit {cluster}: at most {most}. "
            + (f"Set {name}={most}." if most else "Set resources.gpus_per_worker=0.")
        )
    return count


def per_gpu(gpus_per_worker: float) -> int:
    """Workers on one GPU; Ray never splits a worker's share over two."""
    return max(1, math.floor(1 / gpus_per_worker + 1e-9))


def _cpus_per_worker(spec: JobSpec, cluster: Cluster, count: int, reasons: dict[str, str]) -> int:
    wanted = spec.resources.cpus_per_worker
    if wanted == "auto":
        per_node = -(-count // len(cluster.nodes))
        kept = DATA_CPUS if cluster.is_ray else 0
        cpus = max(1, int((min(n.cpus for n in cluster.nodes) - kept) // per_node))
        reasons["cpus_per_worker"] = f"{per_node} worker(s) share a node" + (
            f"; {kept:g} CPU is kept for Ray Data" if kept else ""
        )
    else:
        cpus = wanted
    if count * cpus > cluster.cpus:
        raise PlanError(
            f"resources.cpus_per_worker = {cpus} for {count} workers needs {count * cpus} CPUs; "
            f"{cluster}. Set resources.cpus_per_worker={max(1, int(cluster.cpus // count))}."
        )
    return cpus


def check_cpus(workers: Workers, cluster: Cluster) -> None:
    """Raises PlanError where a live cluster's CPUs are all taken by workers."""
    taken = workers.count * workers.cpus
    if cluster.is_ray and taken + DATA_CPUS > cluster.cpus:
        raise PlanError(
            f"the workers take {taken:g} of {cluster.cpus:g} CPUs and leave none for Ray Data, "
            f"which needs {DATA_CPUS:g}: reads would starve. Lower resources.cpus_per_worker."
        )


def uses_bf16(spec: JobSpec, cluster: Cluster, workers: Workers, reasons: dict[str, str]) -> bool:
    """Whether the model computes in bf16; fp32 otherwise."""
    if spec.precision != "auto":
        return spec.precision == "bf16"
    names = {n.gpu_name or "" for n in cluster.nodes if n.gpus}
    old = [n for n in names if any(k in n.upper() for k in ("V100", "T4", "P100"))]
    if workers.on_gpu and not old:
        reasons["bf16"] = "these GPUs compute in bf16"
        return True
    reasons["bf16"] = (
        f"{old[0]} has no bf16" if old else "CPU workers: fp32 is exact, bf16 no faster"
    )
    return False


def memory_limit(spec: JobSpec, cluster: Cluster, workers: Workers, reasons: dict[str, str]) -> int:
    """Bytes that one worker may fill: of its GPU, or its share of a node."""
    if workers.on_gpu:
        reasons["memory_limit_bytes"] = f"memory of the smallest GPU × {workers.gpus:g}"
        return int(min(n.gpu_memory_bytes for n in cluster.nodes if n.gpus) * min(workers.gpus, 1))
    per_node = -(-workers.count // len(cluster.nodes))
    fewest, most = worker_limits(spec, workers.count)
    if fewest < most:  # nodes come and go: a node may get as many as it has CPUs for
        per_node = min(most, max(1, *(int(n.cpus // workers.cpus) for n in cluster.nodes)))
    smallest = min(n.memory_bytes for n in cluster.nodes)
    reasons["memory_limit_bytes"] = (
        f"{smallest / GIB:.1f} GiB per node shared by {per_node} worker(s)"
    )
    return smallest // per_node


def optimizer_class(spec: JobSpec, on_gpu: bool, reasons: dict[str, str]) -> str:
    """The class that steps the weights, by what can be compiled here."""
    optimizer = spec.optimizer
    match optimizer:
        case SGD():
            return "torch.optim.SGD"
        case RMSProp():
            return "torch.optim.RMSprop"
        case Lion():
            reasons["optimizer_class"] = "torch has none"
            return "orchestrator.train.lion.Lion"
        case Adafactor():
            reasons["optimizer_class"] = "with rates from the schedule, not its own"
            return "transformers.optimization.Adafactor"
        case AdamW() | Adam():
            return _adam_class(optimizer, spec, on_gpu, reasons)


def _adam_class(
    optimizer: AdamW | Adam, spec: JobSpec, on_gpu: bool, reasons: dict[str, str]
) -> str:
    offloaded = on_gpu and spec.zero.offload_optimizer == "cpu"
    name = (
        "deepspeed.ops.adam.FusedAdam"
        if on_gpu and not offloaded
        else "deepspeed.ops.adam.DeepSpeedCPUAdam"
    )
    compiler = "nvcc" if on_gpu and not offloaded else "g++"
    if optimizer.implementation == "deepspeed":
        return name
    if (
        optimizer.implementation == "auto"
        and on_gpu
        and shutil.which(compiler)
        and shutil.which("ninja")
    ):
        reasons["optimizer_class"] = f"{compiler} and ninja are here to compile it"
        return name
    if optimizer.implementation == "auto":
        reasons["optimizer_class"] = (
            f"{compiler} or ninja is missing here: torch's fused kernel needs no compiler"
            if on_gpu
            else "torch's fused CPU kernel needs no compiler"
        )
    return f"torch.optim.{type(optimizer).__name__}"
