"""Killed at a bad moment, a run goes on as if nothing had happened: to the last bit."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
from ray.exceptions import OutOfMemoryError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from orchestrator.errors import RunExistsError, TrainingError
from orchestrator.launch.run import train
from orchestrator.launch.run_lock import locked_folder
from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder, read_json
from orchestrator.spec import JobSpec
from orchestrator.train.checkpoint import committed

STEPS = 240
EVERY = 16  # an epoch has 13 steps: checkpoints fall mid-epoch and, at 208, on a boundary


def job(models: tiny.Tiny, folder: Path, stage: int, **fields: Any) -> JobSpec:
    """Dropout on, a partial last batch in each epoch, several epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(203))
    settings = {
        "name": f"zero{stage}",
        "batch": {"global_batch_size": 16},
        "optimizer": {"lr": 1e-3},
        "zero": {"stage": stage},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": EVERY},
        "resources": {"num_workers": 2},
        "model": {"dropout": 0.1},
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


@pytest.fixture(scope="session")
def uninterrupted(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """Final states by ZeRO stage; filled as tests ask."""
    return _References(models, tmp_path_factory.mktemp("whole"))


class _References(dict[int, dict[str, Any]]):
    def __init__(self, models: tiny.Tiny, folder: Path) -> None:
        super().__init__()
        self.models, self.folder = models, folder

    def __missing__(self, stage: int) -> dict[str, Any]:
        outcome = train(job(self.models, self.folder / str(stage), stage))
        self[stage] = faults.final_state(outcome.folder)
        return self[stage]


def check_whole(run: faults.LiveRun, want: dict[str, Any]) -> None:
    """The run finished, with the weights, optimizer and random state of the uninterrupted one."""
    outcome = read_json(run.folder.outcome)
    assert outcome["status"] == "finished", run.output()
    got = faults.final_state(run.folder)
    assert got["step"] == STEPS
    faults.assert_identical(got["files"], want["files"])
    assert [r["step"] for r in read_steps(run.folder.steps)] == list(range(1, STEPS + 1))


def test_a_killed_worker_a_killed_driver_and_a_damaged_checkpoint_change_nothing(
    models: tiny.Tiny, tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    spec = job(models, tmp_path, 2)
    run = faults.LiveRun(spec)
    run.wait_until(lambda: run.step() >= EVERY + 5)
    run.kill_worker(1)
    run.wait_until(lambda: len(run.events("first_step")) == 2)
    resumed_at = run.events("stream")[1]["step"]
    assert resumed_at > 0, "the second attempt started from nothing"
    run.wait_until(lambda: run.step() >= 3 * EVERY + 5)
    run.wait_until(lambda: len(committed(run.folder.checkpoints)) >= 2)
    run.kill_everything()
    newest, before = (c.step for c in committed(run.folder.checkpoints)[:2])
    broken = faults.damage_newest(run.folder, faults.flip_bit)
    (launch,) = (p for p in run.folder.root.glob("ray/launch-*") if p.is_dir())
    (launch / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text(
        '{"torn'
    )  # no launch may read another's
    again = faults.LiveRun(spec)
    assert again.finish() == 0, again.output()
    assert f"{broken.name} is damaged" in again.output()
    assert not broken.exists()  # put aside, and removed once enough newer ones were committed
    assert EVERY <= before == again.events("stream")[-1]["step"] < newest
    check_whole(again, uninterrupted[2])


class _Killed:
    """A worker group of which Ray's memory monitor has killed a worker."""

    def __len__(self) -> int:
        return 2

    def execute_async(self, *_: Any, **__: Any) -> Any:
        raise OutOfMemoryError("a worker was killed: its node was running out of memory")


def test_a_worker_killed_for_its_memory_costs_a_restart_and_not_the_run() -> None:
    from orchestrator.launch.trainer import GroupConfig

    BackendSetupCallback(GroupConfig()).before_execution_group_shutdown(_Killed())
    with pytest.raises(OutOfMemoryError):  # once Ray mends this, ours can go
        BackendSetupCallback(TorchConfig()).before_execution_group_shutdown(_Killed())


def test_a_signal_commits_a_checkpoint_and_says_how_to_go_on(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    """SIGINT; what `ray job stop` sends is tried in test_jobs_api."""
    spec = job(models, tmp_path, 1, checkpoint={"every_steps": 1000}, stop={"max_steps": 4000})
    run = faults.LiveRun(spec)
    run.wait_until(lambda: run.step() >= 5)
    run.signal(signal.SIGINT)
    assert run.finish(180) == 130, run.output()
    (last,) = committed(run.folder.checkpoints)
    assert last.step >= 5
    assert f"stopped at step {last.step} of 4000" in run.output()
    assert "run the same command again" in " ".join(run.output().split())


def test_divergence_stops_with_step_rate_and_the_last_good_checkpoint(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    spec = job(
        models,
        tmp_path,
        1,
        optimizer={"type": "sgd", "lr": 1e30},
        schedule={"type": "constant"},
        gradient_clipping=None,
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(TrainingError) as ended:
        train(spec)
    text, folder = str(ended.value), RunFolder(Path(spec.storage_path) / spec.name)
    outcome = read_json(folder.outcome)
    assert f"training diverged at step {outcome['step'] + 1}:" in text
    assert "learning rate 1e+30" in text
    assert "Lower optimizer.lr" in text
    saved = [c.step for c in committed(folder.checkpoints)]
    good = [step for step in saved if step < outcome["step"]]
    assert len(good) < len(saved), "the last one holds what the broken step began from"
    assert (f"Last good checkpoint: step {good[0]} " if good else "No good checkpoint") in text
    assert "start over with what you change, --fresh or name=" in text


def test_a_second_driver_of_the_same_run_is_refused(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    """The first one is a process that has the run folder, as `train` has it all the time."""
    spec = job(models, tmp_path, 1)
    root = Path(spec.storage_path) / spec.name
    hold = (
        "import sys, pathlib\nfrom orchestrator.launch.run_lock import locked_folder\n"
        "with locked_folder(pathlib.Path(sys.argv[1]), fresh=False): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunExistsError, match="another process is training this run"):
            train(spec)
        assert not (root / "plan.json").exists()
        first.kill()
    with locked_folder(root, fresh=False):
        pass  # a killed driver leaves nothing to clean up


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a failed test may hold it


@pytest.mark.chaos
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    models: tiny.Tiny,
    tmp_path: Path,
    small_disk: Path,
    uninterrupted: dict[int, dict[str, Any]],
) -> None:
    spec = job(models, tmp_path, 2, storage_path=str(small_disk))
    run = faults.LiveRun(spec)
    run.wait_until(lambda: bool(committed(run.folder.checkpoints)))
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    broken_at = time.monotonic(), run.step()
    ends_in_words(run, "disk full", *broken_at)
    (small_disk / "filler").unlink()
    goes_on(run, spec, uninterrupted[2])


def ends_in_words(run: faults.LiveRun, what: str, broken_at_s: float, step: int) -> None:
    """The run ends by itself, and says what it could not write and what is left."""
    assert run.finish() == 1, run.output()
    text = " ".join(run.output().split())
    assert "a checkpoint could not be written" in text
    assert "Last committed checkpoint: step" in text
    print(f"| {what} | {step} | {time.monotonic() - broken_at_s:.1f} |", end="", flush=True)


def goes_on(run: faults.LiveRun, spec: JobSpec, want: dict[str, Any]) -> None:
    """The same command, storage being mended, goes on from the newest checkpoint to the same end."""
    newest = committed(run.folder.checkpoints)[0].step
    began, again = time.monotonic(), faults.LiveRun(spec)
    starts = len(again.events("first_step"))
    again.wait_until(lambda: len(again.events("first_step")) > starts)
    print(f" {newest} | {time.monotonic() - began:.1f} |", flush=True)
    assert again.finish() == 0, again.output()
    assert again.events("stream")[-1]["step"] == newest
    faults.assert_identical(faults.final_state(again.folder)["files"], want["files"])


def shell(*words: str) -> bool:
    """Whether a command ended well."""
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.chaos
def test_a_folder_that_turns_read_only_ends_the_run_and_it_goes_on_when_mended(
    models: tiny.Tiny, tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    spec = job(models, tmp_path, 2)
    run = faults.LiveRun(spec)
    run.wait_until(lambda: bool(committed(run.folder.checkpoints)))
    folder = str(run.folder.checkpoints)
    if not shell("chattr", "+i", folder):  # a mode is nothing to root
        run.kill_everything()
        pytest.skip("needs chattr, and the right to it")
    try:
        ends_in_words(run, "folder read-only", time.monotonic(), run.step())
    finally:
        shell("chattr", "-i", folder)
    goes_on(run, spec, uninterrupted[2])


@pytest.mark.chaos
def test_a_shared_folder_that_vanishes_ends_the_run_and_it_goes_on_when_it_is_back(
    models: tiny.Tiny, tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    server, shared = tmp_path / "server", tmp_path / "shared"
    server.mkdir()
    shared.mkdir()
    mount = ("mount", "--bind", str(server), str(shared))
    if not shell(*mount):
        pytest.skip("mounting is not allowed here")
    try:
        spec = job(models, tmp_path, 2, storage_path=str(shared))
        run = faults.LiveRun(spec)
        run.wait_until(lambda: bool(committed(run.folder.checkpoints)))
        last = run.step()
        assert shell("umount", "--lazy", str(shared))
        broken_at = time.monotonic()
        assert run.finish() == 1, run.output()
        assert "could not be written" in " ".join(run.output().split())
        print(f"| folder gone | {last} | {time.monotonic() - broken_at:.1f} |", end="", flush=True)
        assert not run.folder.checkpoints.exists(), "made anew on this machine's own disk"
        assert shell(*mount)
        goes_on(run, spec, uninterrupted[2])
    finally:
        shell("umount", "--lazy", str(shared))


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_random_kills_change_nothing(
    stage: int, models: tiny.Tiny, tmp_path: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    """Seven kills a stage: workers and whole clusters, at random steps and at the worst moments."""
    rng = random.Random(stage)
    spec = job(models, tmp_path, stage)
    moments = ["step", "step", "step", "writing", "committed", "boundary", "step"]
    run = faults.LiveRun(spec)
    for count, moment in enumerate(moments):
        before = run.step()
        target = min(before + rng.randint(1, 40), STEPS - 40)
        if run.process.poll() is not None or before >= STEPS - 40:  # its end is near: look at it
            assert run.finish() == 0, run.output()
            check_whole(run, uninterrupted[stage])
            shutil.rmtree(run.folder.root)
            run = faults.LiveRun(spec)
            target = rng.randint(EVERY, 3 * EVERY)
        wait_for(run, moment, target)
        killed_at, whole = run.step(), rng.random() < 0.4
        commits = [c.step for c in committed(run.folder.checkpoints)]
        if whole:
            run.kill_everything()
            run = faults.LiveRun(spec)
        else:
            run.kill_worker(rng.randrange(2))
        starts = len(run.events("first_step"))
        started = time.monotonic()
        run.wait_until(lambda r=run, n=starts: len(r.events("first_step")) > n)
        resumed = run.events("stream")[-1]["step"]
        print(
            f"| {stage} | {count + 1} | {'driver and Ray' if whole else 'worker'} | {moment} | {killed_at} | "
            f"{resumed} | {time.monotonic() - started:.1f} |"
        )
        assert not commits or resumed >= max(commits)
    assert run.finish() == 0, run.output()
    check_whole(run, uninterrupted[stage])


def wait_for(run: faults.LiveRun, moment: str, step: int) -> None:
    """Wait for the worst moment after `step`."""
    run.wait_until(lambda: run.step() >= step)
    saves = len(run.events("save"))
    match moment:
        case "writing":  # files are there, the marker is not
            run.wait_until(
                lambda: (
                    any(
                        not (p / "COMMIT.json").exists()
                        for p in run.folder.checkpoints.glob("step-*")
                    )
                    or run.step() >= STEPS - 3
                )
            )
        case "committed":  # save() has just returned
            run.wait_until(lambda: len(run.events("save")) > saves or run.step() >= STEPS - 3)
        case "boundary":
            run.wait_until(lambda: run.step() % 13 == 0 or run.step() >= STEPS - 3)
        case _:  # "step": at once
            return
