"""Compute the number and size of worker pods, with the plan's arithmetic on described machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.errors import PlanError
from orchestrator.plan import Cluster, describe_cluster
from orchestrator.plan.cluster import GIB, Node
from orchestrator.plan.resources import (
    DATA_CPUS,
    Workers,
    check_cpus,
    most_on,
    per_gpu,
    share_out,
    worker_limits,
)
from orchestrator.spec import JobSpec

MIB = 2**20
STORE_SHARE = 0.1
"""Ray's object store as a share of a pod's memory. It holds a few blocks of rows per worker."""
MIN_STORE_BYTES, MAX_STORE_BYTES = 256 * MIB, 32 * GIB
NCCL_SHM_BYTES = 2 * GIB
"""Bytes of /dev/shm for NCCL beside the object store: an allowance, not a measurement."""


@dataclass(frozen=True)
class PodSize:
    """The resources that one Ray pod requests. They are its limits too."""

    cpus: int
    memory_bytes: int
    gpus: int = 0

    @property
    def store_bytes(self) -> int:
        """Return the bytes of Ray's object store, which is inside /dev/shm."""
        return int(min(MAX_STORE_BYTES, max(MIN_STORE_BYTES, self.memory_bytes * STORE_SHARE)))

    @property
    def shm_bytes(self) -> int:
        """Return the bytes of /dev/shm. They count as memory of the pod."""
        return self.store_bytes + (NCCL_SHM_BYTES if self.gpus else 0)

    @property
    def ray_memory_bytes(self) -> int:
        """Return the bytes that Ray reports as the node's memory: all but /dev/shm."""
        return self.memory_bytes - self.shm_bytes


@dataclass(frozen=True)
class Size:
    """The worker group. `min_pods` is less than `max_pods` for an elastic worker range."""

    workers: Workers
    workers_per_pod: int
    min_pods: int
    max_pods: int
    pod: PodSize
    cluster: Cluster
    """The worker pods as Ray reports them, and as a live plan will see them."""
    reasons: dict[str, str]

    @property
    def elastic(self) -> bool:
        return self.min_pods < self.max_pods


def size_of(spec: JobSpec) -> Size:
    """Return the worker pods for the machines in `kubernetes.cluster`.

    Raises:
        PlanError: The workers do not fit the machines, as in `plan`.
    """
    reasons: dict[str, str] = {}
    machines = _for_pods(describe_cluster(spec.kubernetes.cluster or ""), spec)
    min_workers, most = worker_range(spec, machines, reasons)
    if spec.sweep is not None:  # slots fill all machines
        pods, pod = len(machines.nodes), _whole_machine(machines.nodes[0], most)
        cluster = _as_ray_reports_it(pod, pods, machines)
        reasons["pods"] = "a sweep's slots fill all machines"
        return Size(most, -(-most.count // pods), pods, pods, pod, cluster, reasons)
    if spec.resources.cpus_per_worker == "auto":  # workers share the CPUs of their pods
        most = replace(most, cpus=1)
    pods = _pods_needed(machines, most)
    per_pod = -(-most.count // pods)
    pod = _pod(machines.nodes[0], most, per_pod)
    cluster = _as_ray_reports_it(pod, pods, machines)
    workers = share_out(_with_count(spec, most.count), cluster, reasons)
    check_cpus(workers, cluster)
    reasons["pods"] = f"{per_pod} worker(s) a pod: " + (
        "GPU workers use the fewest machines"
        if workers.on_gpu
        else "CPU workers spread over all machines"
    )
    return Size(workers, per_pod, -(-min_workers // per_pod), pods, pod, cluster, reasons)


def worker_range(spec: JobSpec, cluster: Cluster, reasons: dict[str, str]) -> tuple[int, Workers]:
    """Return the smallest number of workers that can train, and the workers on all machines."""
    workers = share_out(spec, cluster, reasons)
    return worker_limits(spec, workers.count)[0], workers


def _for_pods(machines: Cluster, spec: JobSpec) -> Cluster:
    """Return the machines without the share that is reserved for Kubernetes."""
    reserve, node = spec.kubernetes.node_reserve, machines.nodes[0]
    cpus = math.floor(node.cpus * (1 - reserve))
    if cpus < 1 + DATA_CPUS:
        raise PlanError(
            f"kubernetes.cluster = {spec.kubernetes.cluster}: {cpus} of {node.cpus:g} CPUs are available after "
            f"kubernetes.node_reserve = {reserve:g}; a worker needs 1 and Ray Data {DATA_CPUS:g}. "
            f"Use machines of {math.ceil((1 + DATA_CPUS) / (1 - reserve))} CPUs or more."
        )
    memory = int(node.memory_bytes * (1 - reserve)) // MIB * MIB
    left = node.model_copy(update={"cpus": cpus, "memory_bytes": memory})
    return machines.model_copy(update={"nodes": (left,) * len(machines.nodes)})


def _pods_needed(machines: Cluster, workers: Workers) -> int:
    """Return the number of pods: the fewest machines for GPU workers, all machines for CPU workers."""
    if workers.on_gpu:
        return -(-workers.count // most_on(machines.nodes[0], workers))
    return min(workers.count, len(machines.nodes))


def _pod(machine: Node, workers: Workers, per_pod: int) -> PodSize:
    """Return the size of a pod with `per_pod` workers.

    A CPU pod requests the whole machine. A GPU pod requests its GPUs and the same share of the machine's CPUs
    and memory, or the CPUs of its workers if those are more.
    """
    gpus = -(-per_pod // per_gpu(workers.gpus)) if workers.on_gpu else 0
    share = gpus / machine.gpus if gpus else 1.0
    memory = int(machine.memory_bytes * share) // MIB * MIB
    asked = min(machine.cpus, per_pod * workers.cpus + DATA_CPUS)
    return PodSize(math.floor(max(machine.cpus * share, asked)), memory, gpus)


def _whole_machine(machine: Node, workers: Workers) -> PodSize:
    gpus = int(machine.gpus) if workers.on_gpu else 0
    return PodSize(int(machine.cpus), machine.memory_bytes, gpus)


def _as_ray_reports_it(pod: PodSize, count: int, machines: Cluster) -> Cluster:
    capacity = {"cpus": pod.cpus, "memory_bytes": pod.ray_memory_bytes, "gpus": pod.gpus}
    node = machines.nodes[0].model_copy(update=capacity)
    return Cluster(source=f"Ray cluster of pods on {machines.source}", nodes=(node,) * count)


def _with_count(spec: JobSpec, count: int) -> JobSpec:
    resources = spec.resources.model_copy(update={"num_workers": count})
    return spec.model_copy(update={"resources": resources})
