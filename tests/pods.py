"""Several Ray nodes on one machine, each as if it were a pod: own address, own processes, own /dev/shm.

A pod is a network, a PID and a mount namespace. Its link is one end of a pair whose other end hangs
on a bridge, which stands in a namespace of its own so that nothing of the machine's is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil
import pytest

GCS_PORT = 6379
REDIS_PORT = 6380
START_S = 90
SETTINGS = {
    # Ray takes a node for dead after 5 checks in vain, 3 s apart and 10 s long: 13 s for a killed raylet
    # and over a minute for a link that is down.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_initial_delay_ms": "0",
    # A head that is away for less than this takes nobody along.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_AUTH_MODE": "disabled",
    # Gloo takes the address of the host's name, which is the loopback in every pod.
    "GLOO_SOCKET_IFNAME": "eth0",
    # The pods' workers share this machine's cores: a thread that waits for its siblings must not spin on one.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Nor may they start what nobody asked for.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SHARED_CORES = ("OMP_WAIT_POLICY", "RAY_enable_worker_prestart", "RAY_prestart_worker_first_driver")
"""Which of them any nodes need that share one machine."""


CLUSTERS = count()
"""Two clusters of one process have different names and addresses."""


class Pod:
    """One Ray node in namespaces of its own.

    `identity`: variables by which a hook knows its node, where its address does not tell.
    """

    def __init__(self, pods: Pods, number: int, arguments: list[str], **more: str) -> None:
        self.pods, self.number = pods, number
        self.identity: dict[str, str] = {}
        self.address = f"10.77.{pods.subnet}.{number}"
        self.namespace = f"{pods.name}-{number}"
        self.log = pods.folder / f"pod-{number}-{time.time_ns()}.log"
        self._connect()
        command = ["ray", "start", "--block", f"--node-ip-address={self.address}"]
        command += ["--object-store-memory=100000000", *arguments]
        self.process = self._start([*command], more)

    def _connect(self) -> None:
        # Names of links have at most 15 characters.
        inside, outside = "eth0", f"p{self.number}"
        with suppress(subprocess.CalledProcessError):  # a pod of this number was here before
            ip("netns", "del", self.namespace)
        with suppress(subprocess.CalledProcessError):  # its link may outlive it by a moment
            ip("-n", self.pods.hub, "link", "del", outside)
        ip("netns", "add", self.namespace)
        ip("-n", self.pods.hub, "link", "add", outside, "type", "veth", "peer", "name", inside,
           "netns", self.namespace)  # fmt: skip
        ip("-n", self.pods.hub, "link", "set", outside, "master", "bridge", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", inside)
        ip("-n", self.namespace, "link", "set", inside, "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        # Ray finds its own address by asking for the way to the outside.
        ip("-n", self.namespace, "route", "add", "default", "via", f"10.77.{self.pods.subnet}.254")

    def _start(self, command: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        script = (
            'mount -t tmpfs tmpfs /dev/shm && mkdir -p "$0" && mount -t tmpfs tmpfs "$0" '
            # Ray gives a node 30 s to start, which is not enough on a busy machine; a kubelet would try again too.
            '&& cd "$0" || exit; for try in 1 2 3 4; do "$@" && exit; '
            'tail -n 3 "$POD_LOG" | grep -q "timed out during startup" || exit 1; done'
        )
        into = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace]
        into += ["unshare", "--pid", "--mount", "--fork"]  # all die with the tests
        into += ["--kill-child", "--mount-proc", "bash", "-c", script, str(self.pods.temporary)]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*into, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.pods.environment, **more, "POD_LOG": str(self.log)},
                start_new_session=True,
            )

    def inside(self) -> list[str]:
        """Words that run a command among this pod's processes, on its network."""
        unshare = psutil.Process(self.process.pid)
        until(lambda: bool(unshare.children()), f"pod {self.number}", START_S)
        init = unshare.children()[0].pid
        return ["nsenter", "--target", str(init), "--net", "--pid", "--mount", "--"]

    def processes(self, title: str) -> list[psutil.Process]:
        """This pod's processes by what their command line holds."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for p in family if title in command_line(p)]

    def kill(self) -> None:
        """`kill -9` of the pod: all of its processes at once, its link gone."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.namespace)

    def kill_process(self, title: str) -> None:
        """`kill -9` of one process of the pod."""
        found = self.processes(title)
        assert found, f"no {title} in pod {self.number}"
        found[0].kill()

    def cut_off(self) -> None:
        """The link goes down; nobody is told, and everything in the pod lives on."""
        ip("-n", self.pods.hub, "link", "set", f"p{self.number}", "down")


class Pods:
    """A cluster of pods on a bridge of its own."""

    kinds: tuple[str, ...] = ("worker", "raylet", "pod", "link")
    """What can be taken away."""
    key = 0
    """What tells nodes apart: 0 their address, 1 their id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number = next(CLUSTERS)
        self.subnet = (os.getpid() + 50 * number) % 200 + 20
        self.name = f"orc{os.getpid()}-{number}"
        self.hub = f"{self.name}-hub"
        self.temporary = Path(f"/tmp/{self.name}")
        self.temporary.mkdir(exist_ok=True)
        self.environment = {**environment_of_nodes(), "RAY_TMPDIR": str(self.temporary)}
        self.all: dict[int, Pod] = {}
        self.redis: subprocess.Popen[bytes] | None = None
        self.watcher: subprocess.Popen[bytes] | None = None
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "address", "add", f"10.77.{self.subnet}.254/24", "dev", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        ip("-n", self.hub, "link", "set", "lo", "up")

    @property
    def gcs(self) -> str:
        """The address that drivers and nodes join."""
        return f"10.77.{self.subnet}.1:{GCS_PORT}"

    def start_redis(self) -> None:
        """A Redis of our own, beside the pods."""
        command = ["redis-server", "--bind", f"10.77.{self.subnet}.254", "--port", str(REDIS_PORT)]
        command += ["--save", "", "--requirepass", "pods", "--dir", str(self.folder)]
        into = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.hub]
        with open(self.folder / "redis.log", "ab") as log:
            self.redis = subprocess.Popen(
                [*into, *command], stdout=log, stderr=log, env=self.environment
            )

    def start_head(self, cpus: int, jobs: bool = False) -> Pod:
        """The head: pod 1, with a Jobs API where `jobs` is set (a dozen processes).

        Its GCS keeps everything in Redis where one runs.
        """
        arguments = ["--head", f"--port={GCS_PORT}", f"--num-cpus={cpus}"]
        arguments += [f"--include-dashboard={jobs}", "--dashboard-host=0.0.0.0"]
        more = {}
        if self.redis:
            more["RAY_REDIS_ADDRESS"] = f"10.77.{self.subnet}.254:{REDIS_PORT}"
            more["RAY_external_storage_namespace"] = self.name
            arguments += ["--redis-password=pods"]
        self.all[1] = Pod(self, 1, arguments, **more)
        return self.all[1]

    def start_worker(self, number: int, cpus: int) -> Pod:
        """A worker node."""
        arguments = [f"--address={self.gcs}", f"--num-cpus={cpus}"]
        self.all[number] = Pod(self, number, arguments)
        return self.all[number]

    def start_driver(self, number: int) -> Pod:
        """A node for drivers alone, as `render` makes one where the head may be lost."""
        arguments = [f"--address={self.gcs}", "--num-cpus=0", '--resources={"driver": 100}']
        self.all[number] = Pod(self, number, arguments)
        return self.all[number]

    def wait_for(self, nodes: int, timeout_s: float = START_S) -> None:
        """Until the head counts so many living nodes."""
        script = (  # one process that looks again and again: starting one for each look would cost a core
            "import sys, time; from ray._raylet import GcsClient\n"
            "head = GcsClient(address=sys.argv[1])\n"
            "while sum(n.state == 0 for n in head.get_all_node_info().values()) != int(sys.argv[2]):\n"
            "    time.sleep(0.2)"
        )
        deadline = time.monotonic() + timeout_s
        look = [sys.executable, "-c", script, self.gcs, str(nodes)]
        while not self._ends_well(look, deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"{nodes} nodes expected:\n{self.output()}"
            time.sleep(0.5)

    def _ends_well(self, command: list[str], timeout_s: float) -> bool:
        """Whether a command in the head pod ends within some seconds, and with 0."""
        try:
            return self.run(command, check=False, timeout_s=timeout_s).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def nodes(self) -> dict[str, str]:
        """Living nodes as the head sees them: address (or whatever tells them apart) → node id."""
        script = (
            "import sys; from ray._raylet import GcsClient\n"
            "for n in GcsClient(address=sys.argv[1]).get_all_node_info().values():\n"
            "    if n.state == 0: print('alive', n.node_manager_address, n.node_id.hex())"
        )
        done = self.run([sys.executable, "-c", script, self.gcs], check=False)
        found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("alive ")]
        return {one[self.key]: one[1] for one in found}

    def run(
        self, command: list[str], check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command in the head pod."""
        environment = {**self.environment, "RAY_ADDRESS": self.gcs}
        return subprocess.run(
            [*self.all[1].inside(), *command], env=environment, check=check, timeout=timeout_s,
            capture_output=True, text=True,
        )  # fmt: skip

    def drain(self, pod: Pod, seconds: int) -> None:
        """Announce that a node will be taken away, as a cloud does with a spot machine."""
        node = self.nodes()[pod.address]
        self.run(
            ["ray", "drain-node", "--address", self.gcs, "--node-id", node, "--reason",
             "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", str(seconds)]
        )  # fmt: skip

    def watch(self) -> None:
        """Note from now on when the head takes a node for dead."""
        script = (
            "import sys, time; from ray._raylet import GcsClient\n"
            "head, dead = GcsClient(address=sys.argv[1]), set()\n"
            "while not time.sleep(0.2):\n"
            "    for n in head.get_all_node_info().values():\n"
            "        if n.state == 1 and n.node_id not in dead:\n"
            "            dead.add(n.node_id)\n"
            "            print(time.time(), n.node_manager_address, n.node_id.hex(), flush=True)"
        )
        with open(self.folder / "deaths.log", "ab") as log:
            command = [*self.all[1].inside(), sys.executable, "-c", script, self.gcs]
            self.watcher = subprocess.Popen(
                command, stdout=log, stderr=subprocess.DEVNULL, env=self.environment
            )

    def died_at_s(self, pod: Pod) -> float | None:
        """When `watch` saw the head take a pod for dead, in Unix seconds."""
        for line in (self.folder / "deaths.log").read_text().splitlines():
            at_s, *names = line.split()
            if names[self.key] == pod.address:
                return float(at_s)
        return None

    def where(self, title: str) -> dict[int, psutil.Process]:
        """Pods that hold such a process: number → the first one."""
        found = {n: pod.processes(title) for n, pod in self.all.items()}
        return {n: processes[0] for n, processes in found.items() if processes}

    def output(self) -> str:
        """What the pods said last."""
        logs = sorted(self.folder.glob("pod-*.log"))
        return "\n".join(f"{f.name}: {f.read_text(errors='replace')[-1500:]}" for f in logs)

    def close(self) -> None:
        """Nothing stays behind."""
        if self.watcher:
            self.watcher.kill()
            self.watcher.wait(10)
        for pod in self.all.values():
            pod.kill()
        if self.redis:
            self.redis.kill()
            self.redis.wait(10)
        for path in Path("/run/netns").glob(f"{self.name}-*"):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", path.name)
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def pods(folder: Path, needed: bool = False) -> Iterator[Pods]:
    """Pods below `folder`. Where namespaces are not to be had, that is said, and nodes of one address stand in for
    them, or, where pods are `needed`, the test is skipped."""
    why = impossible()
    if why and needed:
        pytest.skip(f"pods need {why}")
    if why:
        from neighbors import Neighbors

        warnings.warn(f"pods need {why}: nodes of one address instead", stacklevel=2)
    cluster = Neighbors(folder) if why else Pods(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def environment_of_nodes() -> dict[str, str]:
    """This process's environment with SETTINGS, and without what ties it to another Ray."""
    tied = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    plain = {k: v for k, v in os.environ.items() if k not in tied}
    path = os.pathsep.join((str(Path(sys.executable).parent), plain.get("PATH", "")))
    return {**plain, **SETTINGS, "PATH": path}


def impossible() -> str:
    """What is missing for pods; empty where nothing is."""
    if os.environ.get("NO_PODS"):
        return "NO_PODS not to be set"
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if not shutil.which(tool):
            return f"`{tool}`"
    probe = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"root rights for namespaces ({done.stderr.strip()})"


def until(reached: Callable[[], bool], what: str, timeout_s: float = 120) -> float:
    """Poll until something is so; returns the seconds it took."""
    started = time.monotonic()
    while not reached():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def ip(*words: str) -> None:
    """`ip …`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def command_line(process: psutil.Process) -> str:
    """A process's title; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
