"""A Ray of our own: started on a slow machine, explained where it does not come up, cleaned up."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.launch import local_ray, ray_start, temporary
from orchestrator.launch.temporary import LOCK, SOCKET_PATH_BYTES, session_folder, temporary_root

SLOW_AGENT = """
import os, time
try:
    words = open("/proc/self/cmdline").read().split("\\0")
except OSError:
    words = []
if any(word.endswith(os.path.join("dashboard", "agent.py")) for word in words):
    time.sleep(20)
"""
"""A `sitecustomize` by which Ray's dashboard agent comes up later than the raylet's 15 s."""
SESSION = """
import os
from orchestrator.launch.session import ray_session
with ray_session(1) as ray:
    print("up", ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid())
"""


class FakeRay:
    """`ray` whose starts fail as told, one after the other."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.starts = 0
        self.shutdowns = 0

    def init(self, ray: Any, folder: Path, limit_s: float, **options: Any) -> None:
        """Stands in for `ray_start.init`."""
        self.starts += 1
        failure = self.failures.pop(0)
        if failure is not None:
            raise failure

    def shutdown(self) -> None:
        self.shutdowns += 1


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *failures: Exception | None) -> FakeRay:
    fake = FakeRay(*failures)
    monkeypatch.setattr(ray_start, "init", fake.init)
    monkeypatch.setattr(local_ray, "PAUSE_S", 0.0)
    local_ray.start(fake, folder, 2, "python")
    return fake


def test_a_ray_that_does_not_come_up_is_tried_again_with_longer_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = ray_start.RayletDied(), ray_start.StartTimeout()
    assert start(monkeypatch, tmp_path, *late, None).starts == 3
    assert sorted(local_ray.LIMITS_S) == list(local_ray.LIMITS_S)


def test_after_the_last_attempt_the_raylets_own_lines_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / str(len(local_ray.LIMITS_S)) / "session_2026" / "logs"
    logs.mkdir(parents=True)
    text = "[x 1 1] (raylet) I 1\n[2026 C 1 1] (raylet) a.cc:1: Check failed: the agent\n*** Stack ***\n"
    (logs / "raylet.out").write_text(text)
    with pytest.raises(OrchestratorError) as caught:
        start(monkeypatch, tmp_path, *(ray_start.RayletDied() for _ in local_ray.LIMITS_S))
    text = str(caught.value)
    assert "Check failed: the agent" in text
    assert "Stack" not in text
    assert str(tmp_path / "3") in text
    assert local_ray.BUSY.fix in text


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/ray"), "RAY_TMPDIR"),
        (OSError(errno.EROFS, "Read-only file system"), "RAY_TMPDIR"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "RAY_TMPDIR"),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
    ],
)
def test_what_will_not_change_is_not_tried_again_and_the_advice_fits(
    error: Exception, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OrchestratorError) as caught:
        start(monkeypatch, tmp_path, error, None)
    assert fix in str(caught.value)
    assert local_ray.BUSY.fix not in str(caught.value)


def test_a_port_that_was_taken_meanwhile_is_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    assert start(monkeypatch, tmp_path, taken, None).starts == 2


def test_the_raylets_log_names_the_cause_too() -> None:
    log = ["[2026 C 1 1] (raylet) store.cc:1: failed: No space left on device"]
    assert "/dev/shm" in local_ray.cause_of(ray_start.RayletDied(), log).fix
    assert local_ray.cause_of(ray_start.RayletDied(), []) is local_ray.BUSY


def test_what_a_failed_start_left_is_killed_by_its_folder(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    ours, other = (
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        for folder in (tmp_path / "session", tmp_path / "other")
    )
    assert ours.stdout
    assert other.stdout
    ours.stdout.readline(), other.stdout.readline()
    assert ray_start.kill_processes_of(tmp_path / "session") == [ours.pid]
    assert other.poll() is None
    other.kill()
    other.wait()


def test_ports_are_free_and_distinct() -> None:
    ports = ray_start.free_ports(20)
    assert len(set(ports)) == 20
    assert all(port in ray_start.PORTS for port in ports)


def test_a_dead_raylet_is_noticed_at_once_and_a_slow_one_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zombie = SimpleNamespace(pid=7, status=lambda: psutil.STATUS_ZOMBIE)
    monkeypatch.setattr(ray_start, "_raylets", lambda: [zombie])
    release, answered = threading.Event(), threading.Event()
    with pytest.raises(ray_start.RayletDied):
        ray_start._wait_for_node(lambda: release.wait(60) and answered.set(), set(), 600)
    assert not answered.is_set(), "it does not wait for Ray's own call to return"
    release.set()
    alive = SimpleNamespace(pid=7, status=lambda: psutil.STATUS_SLEEPING)
    monkeypatch.setattr(ray_start, "_raylets", lambda: [alive])
    with pytest.raises(ray_start.StartTimeout):
        ray_start._wait_for_node(lambda: time.sleep(5), set(), 0.5)
    answers = iter([RuntimeError, RuntimeError, {"node": 1}])

    def ask() -> Any:
        answer = next(answers)
        if answer is RuntimeError:
            raise RuntimeError("not there yet")
        return answer

    assert ray_start._wait_for_node(ask, set(), 60) == {"node": 1}


# --- folders


def test_a_temporary_folder_too_long_for_sockets_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with session_folder() as folder:
        deepest = folder / temporary.BELOW_ROOT.removeprefix("/ray-12345678/")
        assert len(os.fsencode(deepest)) <= SOCKET_PATH_BYTES
        assert long not in folder.parents


def test_the_users_own_folder_comes_first_and_none_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        assert temporary_root() == Path(short)
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    monkeypatch.setattr(temporary, "_unusable", lambda folder: "Permission denied")
    with pytest.raises(OrchestratorError, match="export RAY_TMPDIR"):
        temporary_root()


def test_folders_of_sessions_go_with_them_and_those_of_the_dead_after_a_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as root:
        monkeypatch.setenv("RAY_TMPDIR", root)
        with session_folder() as folder:
            pass
        assert not folder.exists()
        with pytest.raises(KeyError), session_folder() as failed:
            raise KeyError
        assert failed.exists(), "its logs are kept"
        dead, used = Path(root) / "ray-00000000", Path(root) / "ray-11111111"
        for old in (dead, used, failed):
            old.mkdir(exist_ok=True)
            (old / LOCK).touch()
            os.utime(old, (1, 1))
        with open(used / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with session_folder():
                assert not dead.exists()
                assert not failed.exists()
                assert used.exists(), "another session runs in it"


def test_the_folder_of_a_killed_session_is_removed_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = """
import time
from orchestrator.launch.temporary import session_folder
with session_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as root:
        monkeypatch.setenv("RAY_TMPDIR", root)
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        folder = Path(driver.stdout.readline().strip())
        with session_folder():
            assert folder.exists(), "its process lives"
        driver.kill()
        driver.wait()
        with session_folder():
            assert not folder.exists()


# --- real starts


def run_session(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "RAY_TMPDIR": str(tmp_path), **environment}
    given.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-c", SESSION], env=given, capture_output=True, text=True, timeout=200
    )


def test_an_agent_slower_than_ray_allows_does_not_stop_the_start(tmp_path: Path) -> None:
    """And a home that cannot be written, where Ray would keep its token, does not either."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENT)
    home = tmp_path / "home"
    home.write_text("no folder")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as short:
        path = os.pathsep.join([str(tmp_path), *sys.path])
        # Ray sets its mode in the environment of whatever has started it before.
        done = run_session(Path(short), PYTHONPATH=path, HOME=str(home), RAY_AUTH_MODE="token")
        assert done.stdout == "up True\n", done.stderr
        assert "Traceback" not in done.stderr
        assert os.listdir(short) == []
