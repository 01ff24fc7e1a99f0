"""Signals that ask a run to end, and a Ray that is lost under it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.launch import ray_watch
from orchestrator.launch.ray_watch import RayWatch
from orchestrator.launch.session import _log_node_errors
from orchestrator.launch.signals import hangup_blocked


def python(code: str, **more: Any) -> subprocess.Popen[str]:
    """A Python process that runs `code`, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True, **more
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


STOP = """
import sys, time
from orchestrator.launch.signals import stop_on_signals
asked = []
def ask():
    asked.append(1)
    return len(asked) == 1
with stop_on_signals(ask, print):
    print("ready")
    try:
        deadline = time.monotonic() + 20
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        print("asked", len(asked))
        time.sleep(float(sys.argv[1]))
    except KeyboardInterrupt:
        print("quit")
"""


def stopping(seconds: float, **more: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", STOP, str(seconds)], stdout=subprocess.PIPE, text=True, **more
    )
    assert first_line(process) == "ready"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_for_a_checkpoint_and_a_second_one_quits(number: signal.Signals) -> None:
    process = stopping(20)
    process.send_signal(number)
    assert first_line(process).startswith(f"{number.name}: finishing the step")
    assert first_line(process) == "asked 1"
    process.send_signal(number)
    assert first_line(process) == "quit"
    assert process.wait(10) == 0


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    process = stopping(0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert first_line(process).startswith("SIGTERM")
    assert first_line(process) == "asked 1"
    assert process.wait(10) == 0


def test_a_hangup_is_heard_and_spares_processes_that_are_started() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    try:
        with hangup_blocked():
            child = python("print('ready'); import time; time.sleep(30)")
            assert first_line(child) == "ready"
            os.kill(os.getpid(), signal.SIGHUP)
            child.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            assert child.poll() is None
        assert heard == [signal.SIGHUP]
        child.kill()
        child.wait()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_closed_terminal_is_no_error(tmp_path: Path) -> None:
    code = """
import os, sys
from orchestrator.launch.signals import leave_terminal
try:
    os.read(0, 1)  # until the terminal is closed
except OSError:
    pass
leave_terminal()
print("nobody reads this")
sys.stdout.flush()
open(sys.argv[1], "w").write("went on")
"""
    master, slave = os.openpty()
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(done)], stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    os.close(master)
    assert process.wait(30) == 0
    assert done.read_text() == "went on"


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Handles of Ray's processes that a test may end."""
    import ray

    codes: dict[str, Any] = {"gcs_server": None, "raylet": None}
    processes = {
        kind: [SimpleNamespace(process=SimpleNamespace(poll=lambda kind=kind: codes[kind]))]
        for kind in codes
    }
    node = SimpleNamespace(all_processes=processes)
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return codes


@pytest.mark.parametrize(("dead", "workers_live"), [("gcs_server", True), ("raylet", False)])
def test_a_lost_process_of_ray_is_named(
    dead: str, workers_live: bool, fake_ray: dict[str, Any]
) -> None:
    watch = RayWatch()
    assert watch.lost() is None
    fake_ray[dead] = -9
    assert ray_watch.PROCESSES[dead] in (watch.lost() or "")
    assert watch.workers_live() == workers_live


def test_a_silent_head_of_a_cluster_is_given_up_before_ray_does(
    fake_ray: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(
            ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address)
        )
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        now = [time.monotonic()]
        monkeypatch.setattr(ray_watch.time, "monotonic", lambda: now[0])
        watch = RayWatch()
        now[0] += 3
        assert watch.lost() is None
    now[0] += 3
    assert watch.lost() is None, "it may come back"
    now[0] += 48
    assert address in (watch.lost() or "")


def test_what_ray_says_of_lost_nodes_goes_to_its_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    shown: list[Any] = []
    monkeypatch.setattr(
        ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: shown.append(data)
    )
    _log_node_errors(ray)
    _log_node_errors(ray)
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    print_it = ray._private.worker.print_to_stdstream
    print_it({"pid": "raylet", "lines": ["it died"], "is_err": False}, ignore_prefix=False)
    print_it({"pid": 17, "lines": ["text"], "is_err": False}, ignore_prefix=False)
    assert [one["pid"] for one in shown] == [17]
    assert "it died" in caplog.text
