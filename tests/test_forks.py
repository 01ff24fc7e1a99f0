"""Worker processes by forking: what they share, and what they must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.launch import forks

BECOME = [sys.executable, "-I", "-S", str(Path(forks.__file__).with_name("become.py"))]
SERVER = f"""
import sys
sys.path.insert(0, {str(Path(forks.__file__).parent)!r})
import server
server.IMPORTS = ("random",)
server.main(sys.argv[1])
"""
"""The server without what takes its time."""
SCRIPT = """
import os, random, sys
print(random.random(), os.environ.get("COLOR"), os.getcwd(), *sys.argv[1:], *sys.path[1:2])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def say(address: Path, script: Path, *arguments: str, **more: Any) -> list[str]:
    """What the script prints that is started through the server."""
    done = subprocess.run(
        [*BECOME, str(address), str(script), *arguments],
        capture_output=True, text=True, check=True, timeout=30, **more,
    )  # fmt: skip
    return done.stdout.split()


def serving(address: Path) -> subprocess.Popen[bytes]:
    """A server that listens."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(address)], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not address.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return server


def test_a_fork_has_the_environment_folder_and_arguments_it_was_asked_for(
    tmp_path: Path, script: Path
) -> None:
    server = serving(tmp_path / "socket")
    more = tmp_path / "more"
    environment = {**os.environ, "COLOR": "green", "PYTHONPATH": str(more)}
    said = say(tmp_path / "socket", script, "one", "two", cwd=tmp_path, env=environment)
    again = say(tmp_path / "socket", script, cwd=tmp_path)
    server.communicate()
    assert said[1:] == ["green", str(tmp_path), "one", "two", str(more)]
    assert said[0] != again[0], "two forks drew the same random number"


def test_a_worker_starts_by_itself_where_the_server_is_gone(tmp_path: Path, script: Path) -> None:
    server = serving(tmp_path / "socket")
    server.kill()
    server.wait()
    assert say(tmp_path / "socket", script, "one")[3] == "one"
    assert say(tmp_path / "never", script, "two")[3] == "two"


def test_the_server_leaves_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from orchestrator.launch.forks import fork_server
with fork_server(pathlib.Path({str(tmp_path)!r})) as python:
    print(python, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert "become.py" in parent.stdout.readline()
    (server,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    server.wait(30)


class Probe:
    """Looks at the worker process it lives in."""

    def modules(self) -> list[str]:
        return sorted(set(sys.modules) & {"torch", "transformers", "pandas"})

    def faults(self) -> int:
        """How many pages the kernel had to find while 96 MiB were taken and freed five times, in a thread."""
        import resource
        import threading

        import torch

        counts = []

        def work() -> None:
            for _ in range(6):
                torch.ones(96 * 2**18)
                counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return counts[-1] - counts[0]


def test_workers_of_our_own_ray_have_their_imports_and_use_freed_memory_again(ray: Any) -> None:
    probe = ray.remote(num_cpus=0)(Probe).remote()
    assert ray.get(probe.modules.remote()) == ["pandas", "torch", "transformers"]
    assert ray.get(probe.faults.remote()) < 5 * 96 * 2**20 / 4096 / 2
    ray.kill(probe)
