"""Nodes leave and come back while a run trains on them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import tiny
from pods import SETTINGS, SHARED_CORES
from ray.cluster_utils import Cluster

from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder
from orchestrator.spec import JobSpec
from orchestrator.train.checkpoint import committed

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}


def job(models: tiny.Tiny, folder: Path, stage: int, **fields: Any) -> JobSpec:
    """Steps that take a while: four rows at a time."""
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(203))
    settings: dict[str, Any] = {
        "name": "elastic",
        "batch": {"global_batch_size": 32, "micro_batch_size": 4},
        "optimizer": {"lr": 1e-4},
        "schedule": {"type": "constant"},
        "zero": {"stage": stage},
        "stop": {"max_steps": 4000},
        "checkpoint": {"every_steps": 10},
        "resources": {
            "num_workers": {"min": 1, "max": 2, "elastic_resize_monitor_interval_s": 5},
            "cpus_per_worker": 2,
        },
        **fields,
    }
    return tiny.job(models.bert, train, folder, **settings)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with no room for a worker; nodes with room for one each are added by the test."""
    for name in SHARED_CORES:
        monkeypatch.setenv(name, SETTINGS[name])
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200 * 2**20},
    )
    try:
        yield made
    finally:
        made.shutdown()


def started(run: faults.LiveRun, workers: int, times: int) -> bool:
    """Whether groups of `workers` have found their checkpoint, `times` of them, and the last has stepped."""
    groups = run.events("find")
    return (
        [g["workers"] for g in groups].count(workers) >= times
        and groups[-1]["workers"] == workers
        and run.events("first_step")[-1]["time"] > groups[-1]["time"]
    )


@pytest.mark.parametrize(
    ("stage", "most", "story"),
    [(2, 2, ("lost", "back")), (3, 2, ("lost", "back")), (1, 3, ("back", "lost"))],
    ids=["zero2: 2, 1, 2", "zero3: 2, 1, 2", "zero1: 2, 3, 2"],
)
def test_a_run_shrinks_when_a_node_leaves_and_grows_without_losing_a_step_when_one_comes(
    stage: int, most: int, story: tuple[str, ...], models: tiny.Tiny, tmp_path: Path, cluster: Any
) -> None:
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    resources = {
        "num_workers": {"min": 1, "max": most, "elastic_resize_monitor_interval_s": 5},
        "cpus_per_worker": 2,
    }
    run = faults.LiveRun(job(models, tmp_path, stage, resources=resources), address=cluster.address)
    run.wait_until(lambda: bool(run.events("first_step")) and started(run, 2, 1))
    run.wait_until(lambda: len(committed(run.folder.checkpoints)) > 0)
    for event in story:
        if event == "lost":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            nodes.append(cluster.add_node(**NODE))
        at_s, step, workers = time.monotonic(), run.step(), len(nodes)
        times = [g["workers"] for g in run.events("find")].count(workers) + 1
        run.wait_until(lambda w=workers, t=times: started(run, w, t), 240)
        resumed = run.events("stream")[-1]["step"]
        print(
            f"| {stage} | {event} at step {step}, {workers} worker(s) from step {resumed} | "
            f"{time.monotonic() - at_s:.1f} s |",
            flush=True,
        )
        if event == "lost":
            assert resumed >= max(step - 20, 1)
        else:
            assert resumed == run.events("handover")[-1]["step"], "a step was lost"

    run.signal(signal.SIGINT)
    assert run.finish(180) == 130, run.output()
    records = read_steps(run.folder.steps)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    fixed = fixed_size(models, tmp_path / "fixed", stage, len(records))
    np.testing.assert_allclose([r["loss"] for r in records], fixed, rtol=1e-3)


def fixed_size(models: tiny.Tiny, folder: Path, stage: int, steps: int) -> list[float]:
    """Losses of the same job on two workers from start to end."""
    folder.mkdir()
    run = faults.LiveRun(
        job(models, folder, stage, stop={"max_steps": steps}, resources={"num_workers": 2})
    )
    assert run.finish(400) == 0, run.output()
    return [r["loss"] for r in read_steps(RunFolder(run.folder.root).steps)]
