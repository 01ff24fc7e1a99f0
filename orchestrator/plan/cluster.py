"""The hardware to run on: this machine, a live Ray cluster, or one described in words."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import PlanError
from orchestrator.values import Frozen

GIB = 2**30
GPU_MEMORY_GIB = {
    "K80": 12, "P4": 8, "P100": 16, "T4": 16, "V100": 32, "A10": 24, "A10G": 24, "A30": 24, "A40": 48,
    "A100": 80, "A100-40G": 40, "A100-80G": 80, "L4": 24, "L40": 48, "L40S": 48, "H20": 96, "H100": 80,
    "H200": 141, "B200": 180, "AMD-INSTINCT-MI100": 32, "AMD-INSTINCT-MI210": 64,
    "AMD-INSTINCT-MI250X-MI250": 64, "AMD-INSTINCT-MI300X-OAM": 192,
}  # fmt: skip
"""By the names that Ray gives them, in capitals; makers' figures. Some are sold in several sizes, of which this
is the larger one: `resources.gpu_memory_gib` says otherwise."""


class Node(Frozen):
    """One machine."""

    cpus: float
    memory_bytes: int
    gpus: float = 0
    gpu_name: str | None = None
    gpu_memory_bytes: int = 0
    """0 where the GPU is not known."""


class Cluster(Frozen):
    """All machines a job may use. `source` says where the figures come from."""

    source: str
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(n.cpus for n in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(n.gpus for n in self.nodes)

    @property
    def is_ray(self) -> bool:
        """A live Ray cluster, whose CPUs are those that Ray hands out."""
        return self.source.startswith("Ray cluster")

    @property
    def is_elsewhere(self) -> bool:
        """Described in words, or asked over HTTP: this machine's disk says nothing about its disk."""
        return any(words in self.source for words in ("described", "Ray cluster at"))

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for node in self.nodes:
            gpus = f", {node.gpus:g} × {node.gpu_name or 'GPU'}" if node.gpus else ""
            text = f"{node.cpus:g} CPUs, {node.memory_bytes / GIB:.0f} GiB{gpus}"
            kinds[text] = kinds.get(text, 0) + 1
        parts = [f"{count} × ({text})" if count > 1 else text for text, count in kinds.items()]
        return f"{self.source}: " + "; ".join(parts)


def this_machine() -> Cluster:
    """The machine this process runs on, its memory limited by the container's."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    props: Any = torch.cuda.get_device_properties(0) if gpus else None
    node = Node(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory_limit_bytes(),
        gpus=gpus,
        gpu_name=props.name if props else None,
        gpu_memory_bytes=props.total_memory if props else 0,
    )
    return Cluster(source="this machine", nodes=(node,))


def memory_limit_bytes() -> int:
    """Memory this process may use: the machine's, or the control group's where that is less."""
    import psutil

    total: int = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as handle:
                return min(total, int(handle.read()))
        except (OSError, ValueError):
            continue
    return total


def live_cluster() -> Cluster:
    """The Ray cluster this process is connected to; nodes that offer no CPU (a head) hold no workers."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ray_cluster("Ray cluster", alive)


def ray_cluster(source: str, nodes: Sequence[dict[str, float]]) -> Cluster:
    """A live cluster by its nodes' resources. Nodes that offer no CPU, such as a head, hold no workers.

    Raises PlanError where there is no node at all.
    """
    if not nodes:
        raise PlanError(f"{source} has no living node. Wait until it is up, or look at its head.")
    offering = [resources for resources in nodes if resources.get("CPU", 0) > 0]
    return Cluster(source=source, nodes=tuple(map(ray_node, offering or nodes)))


def ray_node(resources: dict[str, float]) -> Node:
    """A node by the resources that Ray counts on it; memory is in bytes there."""
    names = [k.split(":")[1] for k in resources if k.startswith("accelerator_type:")]
    name = names[0] if names else None
    gpus = resources.get("GPU", 0)
    return Node(
        cpus=resources.get("CPU", 0),
        memory_bytes=int(resources.get("memory", 0)),
        gpus=gpus,
        gpu_name=name if gpus else None,
        gpu_memory_bytes=_gpu_memory(name) if gpus else 0,
    )


def describe_cluster(text: str) -> Cluster:
    """`8xH100x4` is 4 nodes of 8 H100 each; `16cpux2` is 2 nodes of 16 CPUs.

    GPU nodes are taken to have 16 CPUs and 128 GiB of memory per GPU, CPU nodes 4 GiB per CPU;
    `:cpus=…,memory_gib=…,gpu_memory_gib=…` behind it says otherwise. Raises PlanError for anything else, and
    for a GPU of unknown memory.
    """
    body, _, tail = text.partition(":")
    match = re.fullmatch(
        r"([1-9]\d*)x([A-Za-z][A-Za-z0-9-]*?)x([1-9]\d*)|([1-9]\d*)cpux([1-9]\d*)", body
    )
    if not match:
        raise PlanError(
            f"--cluster {text!r} is not understood. Write GPUSxTYPExNODES, as in 8xH100x4, "
            "or CPUScpuxNODES, as in 16cpux2; `:cpus=64,memory_gib=512` may follow."
        )
    options = _options(tail, text)
    if match[4]:
        cpus, count, gpus, name = float(match[4]), int(match[5]), 0.0, None
        memory = options.get("memory_gib", cpus * 4)
    else:
        gpus, name, count = float(match[1]), match[2].upper(), int(match[3])
        cpus, memory = 16 * gpus, options.get("memory_gib", 128 * gpus)
    node = Node(
        cpus=options.get("cpus", cpus),
        memory_bytes=int(memory * GIB),
        gpus=gpus,
        gpu_name=name,
        gpu_memory_bytes=_described_gpu_memory(name, options) if gpus else 0,
    )
    return Cluster(source=f"described {text}", nodes=(node,) * count)


def _options(tail: str, text: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for option in filter(None, tail.split(",")):
        match = re.fullmatch(r"(cpus|memory_gib|gpu_memory_gib)=(\d+(?:\.\d+)?)", option)
        if not match or float(match[2]) == 0:
            raise PlanError(
                f"--cluster {text!r}: {option!r} is not understood. Write cpus=64 or memory_gib=512."
            )
        out[match[1]] = float(match[2])
    return out


def _gpu_memory(name: str | None) -> int:
    return GPU_MEMORY_GIB.get((name or "").upper(), 0) * GIB


def _described_gpu_memory(name: str | None, options: dict[str, float]) -> int:
    found = (
        int(options["gpu_memory_gib"] * GIB) if "gpu_memory_gib" in options else _gpu_memory(name)
    )
    if not found:
        raise PlanError(
            f"the memory of GPU {name} is not known. Add :gpu_memory_gib=48, or what it has. "
            f"Known: {', '.join(GPU_MEMORY_GIB)}."
        )
    return found
