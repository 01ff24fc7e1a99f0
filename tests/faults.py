"""Runs as users start them, in processes of their own, and the means to kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder
from orchestrator.spec import JobSpec, dump_spec
from orchestrator.train.checkpoint import Committed, newest_valid


class LiveRun:
    """`orchestrator train` (or `sweep`) in a process group of its own, on a Ray of its own or the one at `address`.

    `inside` are words that run a command elsewhere (in a pod); `more` is added to the environment.
    """

    def __init__(
        self,
        spec: JobSpec,
        verb: str = "train",
        address: str | None = None,
        inside: Sequence[str] = (),
        **more: str,
    ) -> None:
        self.folder = RunFolder(Path(spec.storage_path) / spec.name)
        job = Path(spec.data.prepared_dir).parent / f"{spec.name}.yaml"
        job.write_text(dump_spec(spec), encoding="utf-8")
        self.log = job.with_suffix(".log")
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "orchestrator", verb, str(job)],
                stdout=log, stderr=subprocess.STDOUT, env={**environment, **more}, start_new_session=True,
            )  # fmt: skip

    def step(self) -> int:
        """The last step that was recorded."""
        records = read_steps(self.folder.steps)
        return records[-1]["step"] if records else 0

    def wait_until(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        """Poll until something is so; fails with the run's output where it never is."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"the run ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.output()}"
            time.sleep(0.005)

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers of this run, by what they call themselves."""
        return self.processes("RayTrainWorker")

    def processes(self, title: str) -> list[psutil.Process]:
        """This run's processes by what they call themselves."""
        return [p for p in self._family() if title in _title(p)]

    def kill_worker(self, index: int = 0) -> None:
        """`kill -9` of one worker process."""
        workers = sorted(self.workers(), key=lambda p: p.pid)
        workers[index % len(workers)].kill()

    def kill_everything(self) -> None:
        """`kill -9` of the driver and its whole Ray: what a power cut leaves behind."""
        if self.process.poll() is not None:
            return
        family = [psutil.Process(self.process.pid), *self._family()]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10)
        self.process.wait(10)

    def signal(self, number: signal.Signals) -> None:
        """Send the driver a signal."""
        self.process.send_signal(number)

    def finish(self, timeout_s: float = 240) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(timeout_s)

    def output(self) -> str:
        """What the run printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of one kind."""
        return [e for e in read_records(self.folder.events) if e["kind"] == kind]

    def _family(self) -> list[psutil.Process]:
        """All descendants; Ray's daemons are children of the driver."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def final_state(folder: RunFolder) -> dict[str, Any]:
    """Everything the last checkpoint holds, by file and name: weights, optimizer, random state."""
    import torch

    checkpoint: Committed | None = newest_valid(folder.checkpoints, lambda _: None)
    assert checkpoint is not None
    files = sorted(checkpoint.folder.rglob("*.pt"))
    state = {
        f.relative_to(checkpoint.folder).as_posix(): torch.load(f, weights_only=False)
        for f in files
    }
    return {"step": checkpoint.step, "files": state}


def assert_identical(one: Any, other: Any, path: str = "") -> None:
    """Equal to the last bit, through all nested values; names the first difference."""
    import numpy as np
    import torch

    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path} differs by {(one - other).abs().max()}"
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{path}/{i}")
    elif isinstance(one, int | float | str | bool | type(None)):
        assert one == other, f"{path}: {one!r} and {other!r}"


def damage_newest(folder: RunFolder, how: Callable[[Path], None]) -> Path:
    """Damage the largest file of the newest checkpoint."""
    newest = newest_valid(folder.checkpoints, lambda _: None)
    assert newest is not None
    victim = max(newest.folder.rglob("*.pt"), key=lambda p: p.stat().st_size)
    how(victim)
    return newest.folder


def flip_bit(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """The second half is gone."""
    with open(path, "rb+") as handle:
        handle.truncate(path.stat().st_size // 2)
