"""Several Ray nodes on one machine without namespaces: one address, one /dev/shm, one set of processes.

What pods are, as far as it goes without rights: nodes of `ray.cluster_utils.Cluster`, with the same verbs.
A link cannot go down here, and a head cannot come back at its address.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from pods import Pods, command_line, environment_of_nodes

STORE = {"object_store_memory": 100_000_000}


class Neighbor:
    """One Ray node beside the others. Its `address` is its node's id, which is all that tells it apart."""

    def __init__(self, number: int, node: Any, identity: dict[str, str]) -> None:
        self.number, self.node, self.identity = number, node, identity
        self.address: str = node.node_id

    def inside(self) -> list[str]:
        """Words that run a command here: none."""
        return []

    def family(self) -> list[psutil.Process]:
        """The node's processes, workers among them."""
        found: list[psutil.Process] = []
        for infos in self.node.all_processes.values():
            for info in infos:
                with suppress(psutil.NoSuchProcess):
                    root = psutil.Process(info.process.pid)
                    found += [root, *root.children(recursive=True)]
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        """This node's processes by what their command line holds."""
        return [p for p in self.family() if title in command_line(p)]

    def kill(self) -> None:
        """`kill -9` of all of its processes at once."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_process(self, title: str) -> None:
        """`kill -9` of one process."""
        found = self.processes(title)
        assert found, f"no {title} on node {self.number}"
        found[0].kill()


class Neighbors(Pods):
    """A cluster of neighbors."""

    kinds = ("worker", "raylet", "pod")
    key = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment_of_nodes()
        del self.environment["GLOO_SOCKET_IFNAME"]  # names a pod's link
        self.all: dict[int, Any] = {}
        self.clusters: list[Any] = []
        self.watcher: subprocess.Popen[bytes] | None = None

    @property
    def gcs(self) -> str:
        """The address that drivers and nodes join."""
        return str(self.clusters[-1].address)

    def start_redis(self) -> None:
        """Of no use here."""
        pytest.skip("a head that comes back at its address needs pods")

    def start_head(self, cpus: int, jobs: bool = False) -> Any:
        """The head: node 1; never with a Jobs API, for which there is one port."""
        from ray.cluster_utils import Cluster

        self.clusters.append(Cluster())
        return self._start(1, num_cpus=cpus, include_dashboard=False)

    def start_worker(self, number: int, cpus: int) -> Any:
        """A worker node."""
        return self._start(number, num_cpus=cpus)

    def start_driver(self, number: int) -> Any:
        """A node for drivers alone."""
        return self._start(number, num_cpus=0, resources={"driver": 100})

    def _start(self, number: int, **wanted: Any) -> Any:
        identity = {"RAY_CLOUD_INSTANCE_ID": f"neighbor-{number}"}
        with _environment({**self.environment, **identity}):
            node = self.clusters[-1].add_node(**STORE, **wanted)
        self.all[number] = Neighbor(number, node, identity)
        return self.all[number]

    def output(self) -> str:
        """Where the nodes' logs lie."""
        return str([c.head_node.get_session_dir_path() for c in self.clusters if c.head_node])

    def close(self) -> None:
        """Nothing stays behind."""
        if self.watcher:
            self.watcher.kill()
            self.watcher.wait(10)
        for one in self.all.values():
            one.kill()
        for cluster in self.clusters:
            with suppress(AssertionError):
                cluster.shutdown()


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Ray's processes inherit this process's environment."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
