"""Resources of a job: workers and their shares, precision, optimizer kernel, memory."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.data.stream import READ_CPUS
from orchestrator.errors import PlanError
from orchestrator.plan.cluster import GIB, Cluster, Node
from orchestrator.spec import JobSpec
from orchestrator.spec.job import WorkerRange
from orchestrator.spec.tuning import quantized
from orchestrator.spec.tuning_rules import NO_GPU

DATA_CPUS = 2 * READ_CPUS
"""CPUs kept free for Ray Data; without them reads starve and the run hangs without a word."""


@dataclass(frozen=True)
class Workers:
    """Number of workers, and the resources of each."""

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
    return Workers(count, gpus, _cpus_per_worker(spec, cluster, count, gpus, reasons))


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


def places(nodes: Sequence[Node], gpus: float, cpus: float) -> int:
    """Workers with so many GPUs and CPUs each that the nodes hold; none lies on two of them."""
    return sum(int(min(_gpu_places(n, gpus), n.cpus // cpus)) for n in nodes)


def _gpu_places(node: Node, gpus: float) -> float:
    if not gpus:
        return math.inf
    whole = int(node.gpus)
    return whole * per_gpu(gpus) + int((node.gpus - whole) / gpus + 1e-9)


def _room(spec: JobSpec, cluster: Cluster, gpus: float) -> int:
    """Return how many workers fit the cluster: with the CPUs they ask for, unless only those can give way."""
    cpus = spec.resources.cpus_per_worker
    if cpus == "auto" or isinstance(spec.resources.num_workers, int):
        cpus = 1
    return places(cluster.nodes, gpus, cpus)


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


def _cpus_per_worker(
    spec: JobSpec, cluster: Cluster, count: int, gpus: float, reasons: dict[str, str]
) -> int:
    wanted = spec.resources.cpus_per_worker
    if wanted == "auto":
        kept = DATA_CPUS if cluster.is_ray else 0
        cpus = max(1, _most_cpus(cluster.nodes, gpus, count, kept))
        per_node = max(most_on(n, Workers(count, gpus, cpus)) for n in cluster.nodes)
        reasons["cpus_per_worker"] = f"{per_node} worker(s) share a node" + (
            f"; {kept:g} CPU is kept for Ray Data" if kept else ""
        )
    else:
        cpus = wanted
    if (found := places(cluster.nodes, gpus, cpus)) < count:
        fits = max(1, _most_cpus(cluster.nodes, gpus, count, 0))
        raise PlanError(
            f"resources.cpus_per_worker = {cpus} for {count} workers: a worker lies on one node, and there "
            f"is a place for {found}; {cluster}. Set resources.cpus_per_worker={fits}."
        )
    return cpus


def _most_cpus(nodes: Sequence[Node], gpus: float, count: int, kept: float) -> int:
    """The most CPUs each with which `count` workers find a place, `kept` CPUs of each node apart; 0 where none do."""
    left = [n.model_copy(update={"cpus": n.cpus - kept}) for n in nodes]
    sizes = range(1, max(1, int(max(n.cpus for n in left))) + 1)
    return bisect.bisect_left(sizes, True, key=lambda cpus: places(left, gpus, cpus) < count)


def most_on(node: Node, workers: Workers) -> int:
    """The most workers of the group that may come to lie on a node: Ray Train fills one before the next."""
    return min(workers.count, places([node], workers.gpus, workers.cpus))


def check_cpus(workers: Workers, cluster: Cluster) -> None:
    """Raises PlanError where a live cluster's CPUs are all taken by workers."""
    taken = workers.count * workers.cpus
    if cluster.is_ray and taken + DATA_CPUS > cluster.cpus:
        raise PlanError(
            f"the workers take {taken:g} of {cluster.cpus:g} CPUs and leave none for Ray Data, "
            f"which needs {DATA_CPUS:g}: reads would starve. Lower resources.cpus_per_worker."
        )


def uses_bf16(spec: JobSpec, cluster: Cluster, workers: Workers, reasons: dict[str, str]) -> bool:
    """Tell whether the model computes in bf16; fp32 otherwise."""
    if spec.precision != "auto":
        return spec.precision == "bf16"
    names = {n.gpu_name or "" for n in cluster.nodes if n.gpus}
    old = [n for n in names if any(k in n.upper() for k in ("V100", "T4", "P100", "P4", "K80"))]
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
        size, whose = _gpu_memory_bytes(spec, cluster)
        reasons["memory_limit_bytes"] = f"{whose} × {workers.gpus:g}"
        return int(size * min(workers.gpus, 1))
    full = replace(workers, count=worker_limits(spec, workers.count)[1])  # nodes come and go
    shares = [(n.memory_bytes, most_on(n, full)) for n in cluster.nodes]
    size, sharing = min((s for s in shares if s[1]), key=lambda s: s[0] / s[1])
    reasons["memory_limit_bytes"] = f"{size / GIB:.1f} GiB per node shared by {sharing} worker(s)"
    return size // sharing


def _gpu_memory_bytes(spec: JobSpec, cluster: Cluster) -> tuple[int, str]:
    """(bytes of the smallest GPU, which says so); raises PlanError where that is not known."""
    given = spec.resources.gpu_memory_gib
    if given is not None:
        return int(given * GIB), "resources.gpu_memory_gib"
    nodes = [n for n in cluster.nodes if n.gpus]
    unknown = [n.gpu_name or "without a name" for n in nodes if not n.gpu_memory_bytes]
    if unknown:
        raise PlanError(
            f"the memory of GPU {unknown[0]} is not known. Where it has 80 GiB: Set resources.gpu_memory_gib=80."
        )
    return min(n.gpu_memory_bytes for n in nodes), "memory of the smallest GPU"


def optimizer_class(spec: JobSpec, on_gpu: bool, reasons: dict[str, str]) -> str:
    """Return the dotted path of the class that steps the weights."""
    offloaded = on_gpu and spec.zero.offload_optimizer == "cpu"
    path, reason = spec.optimizer.implementation_on(on_gpu, offloaded)
    if reason:
        reasons["optimizer_class"] = reason
    return path
