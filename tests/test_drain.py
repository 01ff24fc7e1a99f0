"""Test the preStop hook of pods."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pods import until

from orchestrator.kube import drain


class FakeGcs:
    """A GCS with two nodes; `busy` keeps a drained node alive."""

    def __init__(self, busy: bool = False) -> None:
        self.busy, self.drained = busy, ""

    def get_all_node_info(self, timeout: float) -> dict[bytes, Any]:
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        def node(name: str, address: str, gone: bool) -> Any:
            state = GcsNodeInfo.DEAD if gone else GcsNodeInfo.ALIVE
            return SimpleNamespace(instance_id=name, node_manager_address=address, state=state)

        gone = self.drained == b"b".hex() and not self.busy
        return {b"a": node("pod-a", "10.0.0.1", False), b"b": node("pod-b", "10.0.0.2", gone)}

    def drain_node(
        self, node_id: str, reason: int, message: str, deadline_ms: int
    ) -> tuple[bool, str]:
        self.drained = node_id
        return True, ""


@pytest.mark.parametrize(
    ("name", "address", "busy", "outcome", "drained"),
    [
        ("pod-b", "10.0.0.9", False, "removed", b"b".hex()),
        (None, "10.0.0.2", False, "removed", b"b".hex()),
        ("pod-b", "10.0.0.1", True, "still busy", b"b".hex()),
        ("pod-x", "10.0.0.9", False, "not a node", ""),
    ],
)
def test_a_pod_drains_its_own_node_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    address: str,
    busy: bool,
    outcome: str,
    drained: str,
) -> None:
    gcs = FakeGcs(busy)
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: gcs)
    monkeypatch.setattr(drain, "_own_address", lambda _: address)
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    monkeypatch.delenv("RAY_CLOUD_INSTANCE_ID", raising=False)
    if name:
        monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", name)
    assert outcome in drain.drain("head:6379", deadline_s=0.1)
    assert gcs.drained == drained


def run_hook(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the hook as a pod does."""
    monkeypatch.setattr("sys.argv", ["drain", *words])
    drain.main()


def test_the_pod_with_the_driver_has_it_commit_and_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Only drivers get a signal, and the hook waits for them."""
    script = (
        "import signal, sys, time\n"
        "def leave(*_): time.sleep(0.3); open(sys.argv[-1], 'a').write('left'); sys.exit(130)\n"
        "signal.signal(15, leave); open(sys.argv[-1], 'w').close(); time.sleep(60)"
    )
    place = [tmp_path / name for name in ("driver", "other")]
    words = (["-m", "orchestrator", "train"], ["-m", "orchestrator", "plan"])
    commands = [
        [sys.executable, "-c", script, *w, str(p)] for w, p in zip(words, place, strict=True)
    ]
    driver, other = (subprocess.Popen(command) for command in commands)
    try:
        until(lambda: all(p.exists() for p in place), "both are up", 30)
        mine = {p.pid: psutil.Process(p.pid) for p in (driver, other)}
        for process in mine.values():
            process.info = {"cmdline": process.cmdline()}
        monkeypatch.setattr("psutil.process_iter", lambda fields: list(mine.values()))
        run_hook(monkeypatch, "--deadline-s", "20", "--head")
        assert place[0].read_text() == "left", "it had the time to"
        assert other.poll() is None
        assert "1 driver(s)" in capsys.readouterr().err
    finally:
        for process in (driver, other):
            process.kill()
            process.wait(10)


def test_a_head_without_a_driver_stays_until_the_other_nodes_are_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gcs = FakeGcs()
    monkeypatch.setattr("psutil.process_iter", lambda fields: [])
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: gcs)
    monkeypatch.setattr(drain, "_own_address", lambda _: "10.0.0.1")
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    run_hook(monkeypatch, "--deadline-s", "0.1", "--head", "--address", "head:6379")
    assert "still alive" in capsys.readouterr().err
    gcs.drained = b"b".hex()
    run_hook(monkeypatch, "--deadline-s", "20", "--head", "--address", "head:6379")
    assert "no other node" in capsys.readouterr().err


def test_a_pod_whose_head_is_gone_ends_without_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_hook(monkeypatch, "--deadline-s", "30", "--address", "127.0.0.1:1")
    assert "not drained" in capsys.readouterr().err
