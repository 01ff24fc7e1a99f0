"""Start Ray's processes on this machine and wait for them as long as a busy machine needs.

Ray 2.60 gives its agents a fixed 15 s: the raylet waits that long for files in which they publish their ports and
aborts, and Ray's Python side then waits another 30 s for a process that is a zombie. Python on a machine with far more
work than cores takes longer to start. Here the ports are chosen before the start and published at once, so nothing
waits for the agents; a raylet that is dead is noticed within a second; and the time for the rest is ours to set.

Tested with Ray 2.60; `tests/test_session.py` delays an agent by more than 15 s and fails where Ray's internals change.

See docs/decisions/0116-ray-ports-are-published-before-its-agents-start.md.
"""

from __future__ import annotations

import importlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.2
LISTEN_PORT_FILE = "dashboard_agent_listen_port_{node_id}"
"""In the session's folder: the file that the raylet waits for; Ray passes it the other ports as arguments."""
AGENT_PORTS = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
PORTS = range(20000, 32000)
"""Below the ports that Linux gives to connections, above those of Ray's workers."""


class RayletDied(Exception):
    """The raylet ended before it had registered."""


class StartTimeout(Exception):
    """Ray's processes are alive, but the node did not register in time."""


def init(ray: Any, folder: Path, limit_s: float, **options: Any) -> None:
    """Call `ray.init` for a new local Ray whose files lie in `folder`.

    Args:
        ray: the imported module.
        folder: an empty folder for the session's sockets and logs.
        limit_s: seconds that each stage of the start may take.
        options: further arguments of `ray.init`.

    Raises:
        RayletDied, StartTimeout: as above.
        Exception: whatever `ray.init` raises; Ray has no class for it.
    """
    with _limits(limit_s), _known_ports(folder, limit_s):
        ray.init(address="local", _temp_dir=str(folder), **options)


@contextmanager
def _limits(limit_s: float) -> Iterator[None]:
    """Set Ray's own limits for the start, where the environment does not."""
    limits = {
        "RAY_gcs_server_port_wait_time_s": str(int(limit_s)),
        "RAY_agent_register_timeout_ms": str(int(1000 * limit_s)),
        "RAY_worker_register_timeout_seconds": str(int(limit_s)),
    }
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _known_ports(folder: Path, limit_s: float) -> Iterator[None]:
    """Give the agents their ports, publish them to the raylet, and wait for the node here instead of in Ray."""
    parameter: Any = importlib.import_module("ray._private.parameter")
    services: Any = importlib.import_module("ray._private.services")
    *agent_ports, export_port = free_ports(len(AGENT_PORTS) + 1)
    ports = dict(zip(AGENT_PORTS, agent_ports, strict=True), metrics_export_port=export_port)
    make_params, get_node = parameter.RayParams, services.get_node
    before = {raylet.pid for raylet in _raylets()}

    def wait_for_node(gcs_address: str, node_id: str) -> Any:
        _publish(folder, node_id, ports["dashboard_agent_listen_port"])
        return _wait_for_node(lambda: get_node(gcs_address, node_id), before, limit_s)

    def params(**given: Any) -> Any:
        return make_params(**{**given, **ports})

    parameter.RayParams, services.get_node = params, wait_for_node
    try:
        yield
    finally:
        parameter.RayParams, services.get_node = make_params, get_node


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that nothing listens on."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no free TCP port in {PORTS.start}…{PORTS.stop - 1}")


def _publish(folder: Path, node_id: str, port: int) -> None:
    """Write the file that the agent writes when it is up."""
    for session in folder.glob("session_[0-9]*"):
        target = session / LISTEN_PORT_FILE.format(node_id=node_id)
        temporary = target.with_suffix(".early")
        temporary.write_text(str(port), encoding="ascii")
        os.replace(temporary, target)


def _wait_for_node(ask: Any, before: set[int], limit_s: float) -> Any:
    """Return the node's entry in Ray's tables as soon as it is there.

    Ray's own call blocks for half a minute where there is none, so it runs in a thread that is left behind.
    """
    until = time.monotonic() + limit_s
    answers: list[Any] = []
    asking: threading.Thread | None = None

    def call() -> None:
        with suppress(Exception):  # not there yet
            answers.append(ask())

    while not answers:
        if asking is None or not asking.is_alive():
            asking = threading.Thread(target=call, daemon=True)
            asking.start()
        asking.join(POLL_S)
        started = [raylet for raylet in _raylets() if raylet.pid not in before]
        if not answers and started and all(map(_is_dead, started)):
            raise RayletDied
        if not answers and time.monotonic() > until:
            raise StartTimeout
    return answers[0]


def _raylets() -> list[psutil.Process]:
    """Return this process's raylets, dead ones too as long as nobody has waited for them."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "raylet":
                found.append(child)
    return found


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def kill_processes_of(folder: Path) -> list[int]:
    """Kill the processes that a failed start left: those whose command line names its folder.

    Returns their ids. Ray's atexit handler would end some of them, and only with this process.
    """
    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and str(folder) in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
    for child in psutil.Process().children():
        with suppress(psutil.Error, ChildProcessError):
            if child.pid in killed or (child.name() == "raylet" and _is_dead(child)):
                os.waitpid(child.pid, os.WNOHANG)
    return killed
