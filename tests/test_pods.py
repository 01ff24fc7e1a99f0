"""Nodes of their own addresses: training across them, and what happens when they go."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
from pods import Pods, pods, until

from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json
from orchestrator.spec import JobSpec, dump_spec
from orchestrator.train.checkpoint import committed

pytestmark = pytest.mark.chaos

STEPS = 240
EVERY = 16
START_S = 300
"""Patience with a start: four nodes share this machine's cores."""
FINISH_S = 600
DRAIN_S = 20
"""What a pod that ends has; the hook's own start is a part of it."""
WORKER_CPUS = 2
NODE_CPUS = 3
"""One worker of two CPUs fits, and a task that reads; a second worker does not."""


def job(models: tiny.Tiny, folder: Path, stage: int, **fields: Any) -> JobSpec:
    """Dropout on, a partial last batch in each epoch, two workers of two CPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(203))
    settings = {
        "name": f"zero{stage}",
        "batch": {"global_batch_size": 16},
        "optimizer": {"lr": 1e-3},
        "zero": {"stage": stage},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": EVERY},
        "resources": {"num_workers": 2, "cpus_per_worker": WORKER_CPUS, "gpus_per_worker": 0},
        "model": {"dropout": 0.1},
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


def start(spec: JobSpec, cluster: Pods) -> faults.LiveRun:
    """`orchestrator train`, its driver on the head."""
    inside = cluster.all[1].inside()
    return faults.LiveRun(spec, address=cluster.gcs, inside=inside, **cluster.environment)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Pods]:
    """A head that no worker fits on, and three nodes for two workers."""
    with pods(tmp_path / "pods") as one:
        yield one


@pytest.fixture(scope="module")
def one_node(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Final states by ZeRO stage of runs with both workers on one node; filled as tests ask."""

    class References(dict[int, Any]):
        def __missing__(self, stage: int) -> Any:
            folder = tmp_path_factory.mktemp("one-node")
            with pods(folder / "pods") as single:
                single.start_head(2 * WORKER_CPUS + 1)
                single.wait_for(1)
                run = start(job(models, folder, stage), single)
                until(lambda: len(run.events("first_step")) == 1, "the first step", START_S)
                assert len(single.where("RayTrainWorker")) == 1
                assert run.finish(FINISH_S) == 0, run.output()
            self[stage] = faults.final_state(run.folder)
            return self[stage]

    return References()


def check_whole(folder: RunFolder, want: dict[str, Any]) -> None:
    """The run finished, with the weights, optimizer and random state of the run on one node."""
    assert read_json(folder.outcome)["status"] == "finished", read_json(folder.outcome)
    got = faults.final_state(folder)
    assert got["step"] == STEPS
    faults.assert_identical(got["files"], want["files"])
    assert [r["step"] for r in read_steps(folder.steps)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_nodes_end_bit_for_bit_like_one(
    stage: int, models: tiny.Tiny, tmp_path: Path, cluster: Pods, one_node: dict[int, Any]
) -> None:
    want = one_node[stage]
    cluster.start_head(1)
    for number in (2, 3):
        cluster.start_worker(number, NODE_CPUS)
    cluster.wait_for(3)
    run = start(job(models, tmp_path, stage), cluster)
    run.wait_until(lambda: len(run.events("first_step")) == 1, START_S)
    assert sorted(cluster.where("RayTrainWorker")) == [2, 3], "a worker on each node"
    assert run.finish(FINISH_S) == 0, run.output()
    check_whole(run.folder, want)


def test_lost_workers_raylets_pods_and_links_change_nothing(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods, one_node: dict[int, Any]
) -> None:
    want = one_node[2]
    cluster.start_head(1)
    for number in (2, 3, 4):
        cluster.start_worker(number, NODE_CPUS)
    cluster.wait_for(4)
    cluster.watch()
    run = start(job(models, tmp_path, 2), cluster)
    spare = 5
    for kind in cluster.kinds:
        reached = run.step()
        run.wait_until(lambda s=reached: run.step() >= s + EVERY + 3, START_S)
        pod = cluster.all[max(cluster.where("RayTrainWorker"))]
        starts, commits = len(run.events("first_step")), committed(run.folder.checkpoints)
        killed_at, killed_at_s = run.step(), time.time()
        match kind:
            case "worker":
                pod.kill_process("RayTrainWorker")
            case "raylet":
                pod.kill_process("raylet/raylet")
            case "pod":
                pod.kill()
            case "link":
                pod.cut_off()
        seconds = until(lambda n=starts: len(run.events("first_step")) > n, kind, 200)
        resumed = run.events("stream")[-1]["step"]
        dead = "–"  # a worker's end is no node's
        if kind != "worker":
            until(lambda p=pod: cluster.died_at_s(p) is not None, f"{kind}: a dead node", 60)
            dead = f"{(cluster.died_at_s(pod) or 0) - killed_at_s:.1f}"
        print(f"| 2 | {kind} | {killed_at} | {resumed} | {dead} | {seconds:.1f} |", flush=True)
        assert resumed >= max(c.step for c in commits)
        if kind != "worker":
            pod.kill()
            del cluster.all[pod.number]
            cluster.start_worker(spare, NODE_CPUS)
            spare += 1
    assert run.finish(FINISH_S) == 0, run.output()
    check_whole(run.folder, want)


def test_a_drained_node_is_left_with_a_checkpoint_and_no_step_is_lost(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods
) -> None:
    cluster.start_head(1)
    for number in (2, 3, 4):
        cluster.start_worker(number, NODE_CPUS)
    cluster.wait_for(4)
    spec = job(
        models,
        tmp_path,
        2,
        stop={"max_steps": 50_000},  # more than can be done by then
        checkpoint={"every_steps": 50_000},
        fault_tolerance={"max_failures": 0},  # and no restart to spend
    )
    run = start(spec, cluster)
    run.wait_until(lambda: run.step() >= EVERY, START_S)
    pod = cluster.all[max(cluster.where("RayTrainWorker"))]
    drained = time.monotonic()
    hook = ["-m", "orchestrator.kube.drain", "--deadline-s", f"{DRAIN_S}", "--address", cluster.gcs]
    said = cluster.folder / "hook.log"
    with open(said, "wb") as log:  # what a pod's preStop hook runs, in the pod
        ending = subprocess.Popen(
            [*pod.inside(), sys.executable, *hook],
            env={**cluster.environment, **pod.identity},
            stderr=log,
        )
    run.wait_until(lambda: bool(run.events("notice")), START_S)
    noticed_s = time.monotonic() - drained
    run.wait_until(lambda: len(run.events("first_step")) == 2, START_S)
    resumed_s = time.monotonic() - drained
    assert pod.number not in cluster.where("RayTrainWorker"), "nobody works on the drained node"
    assert ending.wait(60) == 0
    assert re.search(
        rf"drain: the node was removed after|drain: the node is still busy after {DRAIN_S} s",
        said.read_text(),
    )
    run.folder.stop_request.touch()
    assert run.finish(FINISH_S) == 130, run.output()
    notice, (_, resumed) = run.events("notice")[0], run.events("stream")
    saves = [e["step"] for e in run.events("save")]
    assert saves[0] == notice["step"], "a checkpoint at once"
    assert saves[1] == resumed["step"] > notice["step"], "and one at the end, which is resumed"
    done = [r["step"] for r in read_records(run.folder.steps)]
    assert done == list(range(1, len(done) + 1)), "a step was lost or done twice"
    print(
        f"| drain, {DRAIN_S} s | notice after {noticed_s:.1f} s at step {notice['step']} | "
        f"next step after {resumed_s:.1f} s at {resumed['step']} | lost 0 |",
        flush=True,
    )


def test_a_submitted_job_trains_on_while_its_head_is_lost_and_comes_back_with_redis(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods, one_node: dict[int, Any]
) -> None:
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    want, spec = one_node[2], job(models, tmp_path, 2)
    folder, file = RunFolder(Path(spec.storage_path) / spec.name), tmp_path / "job.yaml"
    file.write_text(dump_spec(spec), encoding="utf-8")
    cluster.start_redis()
    cluster.start_head(0, jobs=True)
    for number in (2, 3):
        cluster.start_worker(number, NODE_CPUS)
    cluster.start_driver(4)
    cluster.wait_for(4)
    address = f"http://{cluster.all[1].address}:8265"
    submit = ["ray", "job", "submit", "--address", address, "--submission-id", "ours", "--no-wait"]
    submit += ["--entrypoint-resources", '{"driver": 1}', "--"]
    cluster.run([*submit, "python", "-m", "orchestrator", "train", str(file)])

    def step() -> int:
        return max((r["step"] for r in read_steps(folder.steps)), default=0)

    # Before these, Ray Data opens its first segment, for which it needs the head.
    until(lambda: step() >= 5 * EVERY, "steps on rows from Ray Data", START_S)
    assert sorted(cluster.where("orchestrator train")) == [4], "the driver is not on the head"
    killed_at, started = step(), time.monotonic()
    cluster.all[1].kill()
    gone_on_s = until(lambda: step() >= killed_at + EVERY, "steps without a head")
    cluster.start_head(0, jobs=True)
    cluster.wait_for(4)
    back_s = time.monotonic() - started
    until(lambda: folder.report.exists(), "the end", FINISH_S)
    status = ["python", "-m", "orchestrator", "status", "ours", "--json", "--address", address]
    until(lambda: '"SUCCEEDED"' in cluster.run(status, check=False).stdout, "its end is known", 60)
    starts = [r for r in read_records(folder.events) if r["kind"] == "first_step"]
    print(
        f"| head, Redis | killed at {killed_at}, {EVERY} steps more in {gone_on_s:.1f} s | "
        f"all nodes known again after {back_s:.1f} s | "
        f"group starts {len(starts)} |",
        flush=True,
    )
    assert len(starts) == 1, "the workers were started again"
    check_whole(folder, want)


def test_without_redis_the_same_command_on_a_new_cluster_goes_on(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods, one_node: dict[int, Any]
) -> None:
    want, spec = one_node[2], job(models, tmp_path, 2)
    cluster.start_head(1)
    for number in (2, 3):
        cluster.start_worker(number, NODE_CPUS)
    cluster.wait_for(3)
    run = start(spec, cluster)
    run.wait_until(lambda: run.step() >= 2 * EVERY, START_S)
    killed_at = run.step()
    for pod in cluster.all.values():
        pod.kill()
    run.finish(60)
    newest = max(c.step for c in committed(run.folder.checkpoints))
    started = time.monotonic()
    cluster.start_head(1)
    for number in (2, 3):
        cluster.start_worker(number, NODE_CPUS)
    cluster.wait_for(3)
    again = start(spec, cluster)
    again.wait_until(lambda: len(again.events("first_step")) == 2, START_S)
    print(f"| all nodes | {killed_at} | {newest} | {time.monotonic() - started:.1f} |", flush=True)
    assert again.finish(FINISH_S) == 0, again.output()
    assert again.events("stream")[-1]["step"] == newest
    check_whole(again.folder, want)
