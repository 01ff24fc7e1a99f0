"""A Ray head of our own on this machine: own ports, own folder, token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

START_S = 90


WORKER_PORTS = 200


class LocalHead:
    """`ray start --head` on the loopback, reachable with a token only."""

    def __init__(self, cpus: int = 4, **more: str) -> None:
        """`more` is added to the environment of the head and its jobs, as a Secret is to a container's."""
        # Ray's sockets lie below it, and their paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        ports = head_ports()
        self.address = f"http://127.0.0.1:{ports[0]}"
        self.gcs = f"127.0.0.1:{ports[1]}"
        low = ports[-1]
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            "--dashboard-host=127.0.0.1", "--disable-usage-stats",
            f"--dashboard-port={ports[0]}", f"--port={ports[1]}", f"--ray-client-server-port={ports[2]}",
            f"--dashboard-agent-listen-port={ports[3]}", f"--dashboard-agent-grpc-port={ports[4]}",
            f"--metrics-export-port={ports[5]}", f"--node-manager-port={ports[6]}",
            f"--object-manager-port={ports[7]}", f"--runtime-env-agent-port={ports[8]}",
            f"--min-worker-port={low}", f"--max-worker-port={low + WORKER_PORTS}",
            f"--temp-dir={self.folder}", f"--num-cpus={cpus}", "--object-store-memory=100000000",
        ]  # fmt: skip
        self.log = self.folder / "start.log"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **plain_environment(),
                    **more,
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": self.token,
                },
                start_new_session=True,
                cwd=self.folder,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            try:
                headers = {"Authorization": f"Bearer {self.token}"}
                jobs = requests.get(f"{self.address}/api/jobs/", headers=headers, timeout=5)
                nodes = requests.get(f"{self.address}/api/v0/nodes", headers=headers, timeout=5)
                # The Jobs API answers before there is a node.
                if jobs.ok and '"ALIVE"' in nodes.text:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        raise AssertionError(f"no head after {START_S} s:\n{self.log.read_text(encoding='utf-8')}")

    def environment(self, **more: str) -> dict[str, str]:
        """A shell's environment with this cluster's token."""
        return {**plain_environment(), "RAY_AUTH_TOKEN": self.token, **more}

    def processes(self, title: str) -> list[psutil.Process]:
        """Descendants of the head by what their command line holds."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if title in _command_line(p)]

    def close(self) -> None:
        """`kill -9` of everything that was started here."""
        family = []
        if self.process.poll() is None:
            family = [psutil.Process(self.process.pid)]
            family += family[0].children(recursive=True)
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10)
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def plain_environment() -> dict[str, str]:
    """This process's environment without what ties it to a Ray or a token."""
    tied = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    found = {k: v for k, v in os.environ.items() if k not in tied and k != "RAY_AUTH_TOKEN_PATH"}
    # The head's PATH is the jobs' PATH: without it, `python` there would be another one.
    found["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), found.get("PATH", "")))
    return found


def head_ports() -> list[int]:
    """Ten ports, the last of which begins the workers' range; Ray refuses a head whose other ports lie in it."""
    while True:
        *others, low = free_ports(10)
        if low + WORKER_PORTS < 65_536 and not any(low <= p <= low + WORKER_PORTS for p in others):
            return [*others, low]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
