"""Jobs on a real head with token authentication: followed, stopped, killed, resubmitted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import tiny
import yaml
from head import LocalHead
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import PlanError
from orchestrator.plan import describe_cluster
from orchestrator.remote.head import Head
from orchestrator.remote.request import plan_locally
from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json
from orchestrator.spec import load_spec
from orchestrator.train.checkpoint import committed

STEPS = 800
WAIT_S = 120
PLANTED = "s3cr3t-PLANTED-55d"
SLOW_TO_LEAVE = (
    "import signal, sys, time; "
    'signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), print("left after 5 s"), sys.exit())); '
    'print("ready"); time.sleep(300)'
)


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    """One head for all tests of this file."""
    one = LocalHead(HUB_KEY=PLANTED)
    yield one
    one.close()


@pytest.fixture(scope="module")
def place(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory: job, rows and model, the last two ignored by git; runs lie beside it."""
    folder = tmp_path_factory.mktemp("place")
    here = folder / "here"
    tiny.write_jsonl(here / "data" / "train.jsonl", tiny.labeled(203))
    (here / "data" / "bert").symlink_to(models.bert)
    (here / ".gitignore").write_text("data/\n")
    job = {
        "name": "tiny",
        "task": {"type": "text_classification"},
        "model": {"pretrained": "data/bert"},
        "data": {"train": "data/train.jsonl", "prepared_dir": str(folder / "prepared")},
        "batch": {"global_batch_size": 16},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 50},
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
        "storage_path": str(folder / "runs"),
        "runtime": {"secrets": ["HUB_KEY"], "env_vars": {"NCCL_DEBUG": "WARN"}},
    }
    (here / "job.yaml").write_text(yaml.safe_dump(job))
    return here


class Shell:
    """`orchestrator …` as a person types it, in the working directory, with the token at hand."""

    def __init__(self, head: LocalHead, place: Path) -> None:
        self.head, self.place = head, place

    def start(
        self, *words: str, program: tuple[str, ...] = ("orchestrator",), **more: str
    ) -> subprocess.Popen[str]:
        """The command, running."""
        command = [sys.executable, "-m", *program, *words]
        if program == ("orchestrator",):
            command += ["--address", self.head.address]
        return subprocess.Popen(
            command, cwd=self.place, env=self.head.environment(**more), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str, **more: str) -> tuple[int, str]:
        """(exit status, what was printed)."""
        process = self.start(*words, **more)
        out, _ = process.communicate(timeout=WAIT_S)
        return process.returncode, out

    def submit(self, *words: str) -> str:
        """`submit --no-wait`; the submission's id."""
        status, out = self.run("submit", "job.yaml", "--no-wait", *words)
        found = re.search(r"submitted (\S+):", out)
        assert status == 0, out
        assert found, out
        return found[1]


@pytest.fixture
def shell(head: LocalHead, place: Path) -> Shell:
    return Shell(head, place)


@pytest.fixture(scope="module")
def run(place: Path) -> RunFolder:
    """The run folder of every job here that keeps the name."""
    return RunFolder(place.parent / "runs" / "tiny")


def until(reached: Callable[[], bool], what: str) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s in vain: {what}"
        time.sleep(0.05)


@contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    """Suspend processes for a while."""
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def step(run: RunFolder) -> int:
    """The last step that was recorded."""
    records = read_steps(run.steps)
    return records[-1]["step"] if records else 0


def test_a_head_that_wants_a_token_says_so_in_plain_words(shell: Shell, tmp_path: Path) -> None:
    for mode in ("", "token"):
        status, out = shell.run("jobs", RAY_AUTH_TOKEN="", RAY_AUTH_MODE=mode, HOME=str(tmp_path))
        assert status == 1
        assert "Set RAY_AUTH_TOKEN, set RAY_AUTH_TOKEN_PATH" in out
        status, out = shell.run("jobs", RAY_AUTH_TOKEN="wrong", RAY_AUTH_MODE=mode)
        assert status == 1
        assert "the token from RAY_AUTH_TOKEN" in out
        assert "wrong" not in out
        assert shell.run("jobs", RAY_AUTH_MODE=mode)[0] == 0


def test_a_job_that_the_cluster_can_never_run_is_not_submitted(shell: Shell) -> None:
    status, out = shell.run("submit", "job.yaml", "resources.num_workers=64")
    assert status == 2
    assert "num_workers = 64 with a CPU each does not fit Ray cluster at" in out
    status, out = shell.run("jobs")
    assert "tiny-" not in out


def test_a_stopped_job_commits_and_the_next_submission_goes_on_from_there(
    shell: Shell, run: RunFolder
) -> None:
    name = shell.submit("checkpoint.every_steps=1000")
    follower = shell.start("logs", name, "--follow")
    until(lambda: step(run) >= 5, "the first steps")
    with suspended(
        shell.head.processes("RayTrainWorker")
    ):  # else a slow machine stops a finished run
        driver = shell.head.processes("-m orchestrator train job.yaml")[-1].environ()
        stopping = shell.start("stop", name)
        until(run.stop_request.exists, "the request to stop")
    assert driver["NCCL_DEBUG"] == "WARN", "from runtime.env_vars"
    assert driver["HUB_KEY"] == PLANTED, "from the head's own environment"
    out, _ = stopping.communicate(timeout=WAIT_S)
    assert stopping.returncode == 0, out
    assert out.strip() == f"{name}: STOPPED"
    (checkpoint,) = committed(run.checkpoints)
    assert checkpoint.step >= 5, "SIGTERM came, and there was time to commit"
    said, _ = follower.communicate(timeout=WAIT_S)
    assert follower.returncode == 130, said
    assert f"stopped at step {checkpoint.step} of {STEPS}" in said

    # The same by Ray's own command line, and its driver killed.
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "job", "submit", "--address", shell.head.address, "--submission-id", "by-hand"]
    command += [
        "--no-wait",
        "--working-dir",
        ".",
        "--runtime-env-json",
        '{"excludes": ["nothing"]}',
    ]
    words = ["--", "python", "-m", "orchestrator", "train", "job.yaml"]
    environment = shell.head.environment(
        RAY_AUTH_MODE="token", RAY_RUNTIME_ENV_IGNORE_GITIGNORE="1"
    )
    subprocess.run(
        [*command, *words], cwd=shell.place, env=environment, check=True, capture_output=True
    )
    until(lambda: len(committed(run.checkpoints)) >= 2, "a checkpoint of the second job")
    (driver,) = shell.head.processes("-m orchestrator train job.yaml")[-1:]
    driver.kill()
    status, out = shell.run("logs", "by-hand", "--follow")
    assert status == 137, out
    assert "step" in out

    reached = max(c.step for c in committed(run.checkpoints))
    status, out = shell.run("submit", "job.yaml", "--name", "third")
    assert status == 0, out
    assert "tiny: finished" in out
    status, refused = shell.run("submit", "job.yaml", "--name", "third")
    assert status == 1
    assert "already has a job of this name" in refused
    assert f"{STEPS} steps; " in out, "the rows are prepared by now: all could be planned"
    starts = [e["step"] for e in read_records(run.events) if e["kind"] == "stream"]
    assert starts[0] == 0
    assert starts[1] == checkpoint.step
    assert starts[2] >= reached
    assert read_json(run.outcome)["status"] == "finished"
    assert [r["step"] for r in read_steps(run.steps)] == list(range(1, STEPS + 1))
    status, shown = shell.run("status", "third", "--json")
    assert '"status": "SUCCEEDED"' in shown
    assert '"exit_code": 0' in shown

    # What was said and written holds no secret that the job had, and no token.
    text = "".join([said, out, shown, *(shell.run("logs", j)[1] for j in (name, "by-hand"))])
    files = {f: f.read_bytes() for f in run.root.rglob("*") if f.is_file()}
    assert {"plan.json", "report.html", "driver.log", "job.yaml"} <= {f.name for f in files}
    for secret in (PLANTED, shell.head.token):
        assert secret not in text
        assert [f for f, data in files.items() if secret.encode() in data] == []


def test_with_prepared_rows_a_live_cluster_is_planned_for_to_the_last_byte(
    shell: Shell, place: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the jobs above: their rows lie where this machine sees them."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("RAY_AUTH_TOKEN", shell.head.token)
    done = CliRunner().invoke(app, ["plan", "job.yaml", "--json", "--address", shell.head.address])
    assert done.exit_code == 0, done.output
    cluster = json.loads(done.stdout[done.stdout.index("{") :])["cluster"]
    assert cluster["source"] == f"Ray cluster at {shell.head.address}"
    assert [node["cpus"] for node in cluster["nodes"]] == [4]
    spec = load_spec("job.yaml", files="packed")
    with pytest.raises(PlanError, match=r"GiB"):
        plan_locally(spec, describe_cluster("4cpux1:memory_gib=0.01"))
    unprepared = load_spec("job.yaml", ["data.max_length_tokens=9"], files="packed")
    assert plan_locally(unprepared, describe_cluster("4cpux1")) is None


def test_a_job_that_fails_exits_as_its_driver_did(shell: Shell, run: RunFolder) -> None:
    until(run.plan.exists, "the run of the test before")
    status, out = shell.run("submit", "job.yaml", "optimizer.lr=1e-2")
    assert status == 2, out
    assert "holds a run of another job; it differs in" in out
    assert "optimizer.lr" in out


def test_stop_gives_a_job_its_time_and_does_not_wait_for_ever_for_a_pending_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", shell.head.token)
    ray_jobs = Head(shell.head.address).jobs
    ray_jobs.submit_job(entrypoint="true", submission_id="waits", entrypoint_num_cpus=99)
    ray_jobs.submit_job(
        entrypoint=f"exec python -c '{SLOW_TO_LEAVE}'",
        submission_id="slow",
        runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "20"}},
    )
    pending = shell.start("stop", "waits")
    until(lambda: "ready" in shell.run("logs", "slow")[1], "the job's handler")
    status, out = shell.run("stop", "slow")
    assert status == 0, out
    assert out.strip() == "slow: STOPPED"
    assert "left after 5 s" in shell.run("logs", "slow")[1], "Ray's default would have killed it"
    out, _ = pending.communicate(timeout=WAIT_S)
    assert pending.returncode == 0, out
    assert "RAY_JOB_START_TIMEOUT_SECONDS" in out


def test_an_unknown_job_is_named(shell: Shell) -> None:
    status, out = shell.run("status", "nobody")
    assert status == 1
    assert "orchestrator jobs --address" in out
