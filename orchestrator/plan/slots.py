"""Number of trials that a sweep runs at once, and the resources of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from orchestrator.errors import PlanError
from orchestrator.plan.cluster import Cluster, Node
from orchestrator.plan.resources import (
    DATA_CPUS,
    Workers,
    check_cpus,
    per_gpu,
    places,
    share_out,
)
from orchestrator.spec import JobSpec
from orchestrator.spec.job import WorkerRange
from orchestrator.spec.search_space import default_trials
from orchestrator.spec.sweep import Choice, IntUniform, SweepSpec

WORKERS = "resources.num_workers"


@dataclass(frozen=True)
class Slots:
    """`count` worker groups, each of which runs trial after trial."""

    count: int
    share: Cluster
    """What a trial's plan sees of the cluster: the smallest share, without CPUs that are kept for Ray Data."""
    workers: Workers
    """Of a slot as it is started, with the job's own number of them."""
    reason: str


def slots_of(spec: JobSpec, cluster: Cluster) -> Slots:
    """The slots of a job with a sweep section; nothing of its data is needed.

    A slot keeps to one node where its workers fit one. Raises PlanError, with a setting that does fit,
    where one slot or as many as are wanted do not.
    """
    sweep = spec.sweep
    assert sweep is not None
    need = _Need.of(spec, sweep, cluster)
    room = _room(need, cluster)
    trials = default_trials(sweep)
    count = (
        max(1, min(room, trials))
        if sweep.max_concurrent_trials == "auto"
        else sweep.max_concurrent_trials
    )
    if room == 0:
        with fitting(count):
            check_cpus(share_out(_with_workers(spec, need.most), cluster, {}), cluster)
        raise PlanError(f"one slot of {need} does not fit {cluster}.")
    if count > room:
        raise PlanError(
            f"sweep.max_concurrent_trials = {count}, {need} each, do not fit {cluster}: at most {room}. "
            f"Set sweep.max_concurrent_trials={room}, or auto."
        )
    share = _share(need, cluster, count)
    with fitting(count):
        most = share_out(_with_workers(spec, need.most), share, {})
        workers = replace(share_out(spec, share, {}), cpus=most.cpus)
    return Slots(count, share, workers, _reason(sweep, need, cluster, trials < room))


def _reason(sweep: SweepSpec, need: _Need, cluster: Cluster, few: bool) -> str:
    if sweep.max_concurrent_trials != "auto":
        return "sweep.max_concurrent_trials"
    offered = f"{cluster.gpus:g} GPUs" if need.gpus else f"{cluster.cpus:g} CPUs"
    kept = f", {DATA_CPUS:g} CPU kept for Ray Data" if cluster.is_ray else ""
    limit = f"; no more than {default_trials(sweep)} trials" if few else ""
    return f"{offered}, {need} per trial{kept}{limit}"


@dataclass(frozen=True)
class _Need:
    """Least resources of one slot."""

    workers: int
    gpus: float
    cpus: int
    most: int | None
    """The largest number of workers that a trial has, where it is searched; slots are rebuilt to it."""
    fixed: bool
    """The number of workers does not grow with the share."""

    @staticmethod
    def of(spec: JobSpec, sweep: SweepSpec, cluster: Cluster) -> _Need:
        wanted, searched = spec.resources, sweep.dimensions().get(WORKERS)
        match wanted.num_workers:
            case WorkerRange(min=fewest):
                workers, fixed = fewest, False
            case "auto":
                workers, fixed = 1, False
            case count:
                workers, fixed = count, True
        most = None
        match searched:
            case Choice(values=values):
                most = max((n for n in values if isinstance(n, int)), default=None)
            case IntUniform(high=high):
                most = high
        gpus = (1.0 if cluster.gpus else 0.0) if (g := wanted.gpus_per_worker) == "auto" else g
        cpus = 1 if wanted.cpus_per_worker == "auto" else wanted.cpus_per_worker
        return _Need(max(workers, most or 1), gpus, cpus, most, fixed or most is not None)

    def places(self, node: Node) -> int:
        """Workers that fit a node."""
        return places([node], self.gpus, self.cpus)

    def __str__(self) -> str:
        return f"{self.workers} × {f'{self.gpus:g} GPU' if self.gpus else self.cpus}"


def _room(need: _Need, cluster: Cluster) -> int:
    """Return how many slots fit: within nodes where one holds a slot, else over whole nodes."""
    room = sum(need.places(n) // need.workers for n in cluster.nodes)
    if room == 0:
        nodes = _useful(need, cluster)
        room = next((s for s in range(len(nodes), 0, -1) if _whole(need, nodes, s)), 0)
    if not cluster.is_ray:
        return room
    taken = need.workers * need.cpus
    return min(room, int((cluster.cpus - DATA_CPUS) // taken))


def _useful(need: _Need, cluster: Cluster) -> list[Node]:
    """Nodes that hold a worker at all, the smallest first."""
    found = [n for n in cluster.nodes if need.places(n)]
    return sorted(found, key=lambda n: (need.places(n), n.cpus, n.memory_bytes))


def _whole(need: _Need, nodes: list[Node], slots: int) -> list[Node]:
    """The whole nodes that every slot gets at least; none where they hold too little."""
    each = len(nodes) // slots
    used = nodes[len(nodes) - slots * each :]
    mine = [_least(used[i::each]) for i in range(each)]
    return mine if sum(map(need.places, mine)) >= need.workers else []


def _share(need: _Need, cluster: Cluster, slots: int) -> Cluster:
    """The smallest of the slots' shares: whole nodes or a part of one, whatever is more.

    A given number of GPU workers keeps together on one node where it can.
    """
    nodes = _useful(need, cluster)
    ways = []
    if any(need.places(n) >= need.workers for n in nodes):
        ways.append([_part(need, nodes, slots)])
    if not ways or not (need.gpus and need.fixed):
        ways.append(_whole(need, nodes, slots))
    mine = max(ways, key=lambda way: (sum(map(need.places, way)), sum(n.cpus for n in way)))
    if cluster.is_ray:
        mine = _without_read_cpus(need, mine, cluster.cpus, slots)
    return cluster.model_copy(
        update={"nodes": tuple(mine), "source": f"a slot of {cluster.source}"}
    )


def _part(need: _Need, nodes: list[Node], slots: int) -> Node:
    """Return the least that a slot gets of a node, each new slot going to the node with most room for it."""
    held = [0] * len(nodes)
    room = [need.places(n) // need.workers for n in nodes]
    for _ in range(slots):
        best = max(range(len(nodes)), key=lambda i: (held[i] < room[i], room[i] / (held[i] + 1)))
        held[best] += 1
    return _least([_fraction(need, n, k) for n, k in zip(nodes, held, strict=True) if k])


def _least(nodes: list[Node]) -> Node:
    """A node of which each of these has at least as much."""
    figures = {
        name: min(getattr(n, name) for n in nodes)
        for name in ("cpus", "memory_bytes", "gpus", "gpu_memory_bytes")
    }
    return min(nodes, key=lambda n: n.gpu_memory_bytes).model_copy(update=figures)


def _fraction(need: _Need, node: Node, slots: int) -> Node:
    """One of `slots` equal parts of a node."""
    gpus = node.gpus
    if need.gpus and slots > 1:
        whole, rest = divmod(need.places(node) // slots, per_gpu(need.gpus))
        gpus = whole + rest * need.gpus
    return node.model_copy(
        update={
            "cpus": node.cpus / slots,
            "memory_bytes": node.memory_bytes // slots,
            "gpus": gpus,
        }
    )


def _without_read_cpus(need: _Need, nodes: list[Node], cpus: float, slots: int) -> list[Node]:
    """The share, less what all slots together must leave to Ray Data's tasks, which run on any node."""
    given = sum(int(n.cpus) for n in nodes) * slots
    over = max(0.0, given + DATA_CPUS - cpus)
    each = -(-over // (slots * len(nodes)))
    least = need.cpus * -(-need.workers // len(nodes))
    return [n.model_copy(update={"cpus": max(least, int(n.cpus) - each)}) for n in nodes]


def _with_workers(spec: JobSpec, count: int | None) -> JobSpec:
    if count is None:
        return spec
    resources = spec.resources.model_copy(update={"num_workers": count})
    return spec.model_copy(update={"resources": resources})


@contextmanager
def fitting(slots: int) -> Iterator[None]:
    """Says of what does not fit that a slot is what it has to fit."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"a trial does not fit one of {slots} slots: {error}") from error
