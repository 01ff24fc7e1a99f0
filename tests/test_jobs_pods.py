"""The quickstart, submitted to a head that runs no work, on nodes that were started in other folders."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pods import Pods, pods, until

from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json
from orchestrator.train.checkpoint import committed

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
STEPS = 60
WAIT_S = 300


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Pods]:
    """A head without CPUs that wants a token, and two nodes with room for one worker each."""
    if not (ROOT / "jobs" / "data" / "minilm").exists():
        pytest.skip("needs the quickstart's model and data: python jobs/fetch.py quickstart")
    with pods(tmp_path / "pods", needed=True) as one:
        one.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        one.start_head(0, jobs=True)
        for number in (2, 3):
            one.start_worker(number, 3)
        one.wait_for(3)
        yield one


def submit(cluster: Pods, folder: Path, name: str) -> subprocess.Popen[str]:
    """`ray job submit`, following; the job's paths are relative to the repository."""
    train = (
        f"cd {ROOT} && exec python -m orchestrator train jobs/quickstart.yaml storage_path={folder}/runs "
        f"data.prepared_dir={folder}/prepared stop.max_epochs=null stop.max_steps={STEPS} "
        "checkpoint.every_steps=10 evaluation.baseline_rows=null resources.cpus_per_worker=2"
    )
    address = f"http://{cluster.all[1].address}:8265"
    command = [
        "ray",
        "job",
        "submit",
        "--address",
        address,
        "--submission-id",
        name,
        "--",
        "sh",
        "-c",
    ]
    return subprocess.Popen(
        [*cluster.all[1].inside(), *command, train], env=cluster.environment, text=True, cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_quickstart_runs_under_a_head_without_cpus_and_goes_on_when_its_driver_was_killed(
    cluster: Pods, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "runs" / "quickstart")
    job = submit(cluster, tmp_path, "first")

    def some_steps() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return len(committed(run.checkpoints)) >= 1

    until(some_steps, "a checkpoint", WAIT_S)
    assert sorted(cluster.where("RayTrainWorker")) == [2, 3], "no worker on the head"
    (driver,) = cluster.all[1].processes("-m orchestrator train")[-1:]
    driver.kill()
    said, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 1, said
    status = cluster.run(
        ["python", "-m", "orchestrator", "status", "first", "--json", "--address",
         f"http://{cluster.all[1].address}:8265"],
    )  # fmt: skip
    shown = json.loads(status.stdout)
    assert shown["status"] == "FAILED"
    reached = max(c.step for c in committed(run.checkpoints))

    job = submit(cluster, tmp_path, "second")
    said, _ = job.communicate(timeout=WAIT_S)
    assert job.returncode == 0, said
    assert "quickstart: finished" in said
    starts = [e["step"] for e in read_records(run.events) if e["kind"] == "stream"]
    assert starts == [0, reached]
    assert read_json(run.outcome)["status"] == "finished"
    assert [r["step"] for r in read_steps(run.steps)] == list(range(1, STEPS + 1))
