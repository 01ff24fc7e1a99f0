"""A sweep whose workers, slots and nodes are killed while it runs, and one whose node is announced to go."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
from pods import SETTINGS, SHARED_CORES, Pods, pods, until
from test_sweep import ended, facts, job, lr

from orchestrator.report.records import read_records, read_steps
from orchestrator.report.trial_log import open_log
from orchestrator.run_folder import SweepFolder
from orchestrator.spec import JobSpec

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

START_S = 300
TRIALS = 20
MOST_PAUSE_S = 60
NODE_CPUS = 3
"""One worker of two CPUs fits, and a task that reads."""
SEED = 7
STEPS_OF_A_DRAIN = 2000
"""More than are done in its 12 s, on a fast machine too."""


def search(slots: int, **more: Any) -> dict[str, Any]:
    return {
        "space": {"optimizer.lr": lr(1e-5, 1e-3)},
        "num_trials": TRIALS,
        "scheduler": {"type": "none"},
        "max_trial_failures": 100,
        "max_concurrent_trials": slots,
        **more,
    }


def make(models: tiny.Tiny, folder: Path, slots: int, **more: Any) -> JobSpec:
    """Trials of some seconds each, reporting three times."""
    resources = {"num_workers": 1, "cpus_per_worker": 2, "gpus_per_worker": 0}
    return job(
        models, folder, "sweep", search(slots, **more), stop={"max_steps": 120},
        evaluation={"every_steps": 40}, checkpoint={"every_steps": 10}, resources=resources,
    )  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Pods]:
    """A head that no worker fits on, and three nodes with room for one each."""
    with pods(tmp_path / "pods") as one:
        one.start_head(1)
        for number in (2, 3, 4):
            one.start_worker(number, NODE_CPUS)
        one.wait_for(4)
        yield one


def start(spec: JobSpec, cluster: Pods) -> faults.LiveRun:
    inside = cluster.all[1].inside()
    return faults.LiveRun(spec, "sweep", address=cluster.gcs, inside=inside, **cluster.environment)


def starts(folder: SweepFolder) -> int:
    """How often a trial has been begun or gone on with, up to its first step."""
    events = (folder.root / "trials").glob("*/metrics/events.jsonl")
    return sum(e["kind"] == "first_step" for path in events for e in read_records(path))


def strike(cluster: Pods, kind: str, rng: random.Random) -> bool:
    """Kill one thing of a kind; False where there is none at the moment."""
    if kind == "node":
        number = rng.choice([n for n in cluster.all if n > 1])
        cluster.all.pop(number).kill()
        cluster.start_worker(max(*cluster.all, number) + 1, NODE_CPUS)
        return True
    titles = {"worker": "RayTrainWorker", "slot": "TrainController", "trial proxy": "TrialProxy"}
    found = [p for pod in cluster.all.values() for p in pod.processes(titles[kind])]
    if found:
        rng.choice(found).kill()
    return bool(found)


def test_every_trial_of_a_sweep_under_chaos_ends_as_it_does_without(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods
) -> None:
    run = start(make(models, tmp_path / "chaos", 2), cluster)
    folder = SweepFolder(run.folder.root)
    run.wait_until(lambda: ended(folder) >= 1, START_S)
    rng, struck, began = random.Random(SEED), Counter[str](), time.monotonic()
    while run.process.poll() is None:
        kind = rng.choice(["worker", "slot", "trial proxy", "node"])
        if strike(cluster, kind, rng):
            struck[kind] += 1
            print(f"{time.monotonic() - began:5.0f} s {kind}, {ended(folder)} ended", flush=True)
        # Kills that come faster than workers start would only measure the machine.
        steps, until_s = starts(folder), time.monotonic() + MOST_PAUSE_S
        while time.monotonic() < until_s and run.process.poll() is None and starts(folder) == steps:
            time.sleep(0.2)
        time.sleep(rng.uniform(1, 5))
        assert time.monotonic() - began < 1100, run.output()
    print(f"| {dict(struck)} | {time.monotonic() - began:.0f} s |", flush=True)
    assert run.finish() == 0, run.output()
    cluster.close()

    patient = {name: SETTINGS[name] for name in SHARED_CORES}
    whole = faults.LiveRun(make(models, tmp_path / "whole", 1), "sweep", **patient)
    assert whole.finish(400) == 0, whole.output()
    want, got = facts(open_log(SweepFolder(whole.folder.root))), facts(open_log(folder))
    assert len(want) == TRIALS
    assert {status for _, _, status in want.values()} == {"finished"}
    for trial in want:
        assert got[trial] == want[trial], trial
    ends = [r["trial"] for r in read_records(folder.log) if r["kind"] == "end"]
    assert sorted(ends) == sorted(want), "a trial ended twice"


def test_a_slot_on_a_drained_node_commits_and_its_trial_is_charged_nothing(
    models: tiny.Tiny, tmp_path: Path, cluster: Pods
) -> None:
    spec = make(models, tmp_path, 1, num_trials=1, max_trial_failures=0)
    spec = spec.model_copy(
        update={
            "stop": spec.stop.model_copy(update={"max_steps": STEPS_OF_A_DRAIN}),
            "checkpoint": spec.checkpoint.model_copy(update={"every_steps": STEPS_OF_A_DRAIN}),
            "evaluation": spec.evaluation.model_copy(update={"every_steps": "end"}),
        }
    )
    run = start(spec, cluster)
    trial = SweepFolder(run.folder.root).trial("t00000")

    def events(kind: str) -> list[dict[str, Any]]:
        return [e for e in read_records(trial.events) if e["kind"] == kind]

    run.wait_until(lambda: bool(events("first_step")), START_S)
    pod = cluster.all[max(cluster.where("RayTrainWorker"))]
    drained = time.monotonic()
    cluster.drain(pod, 12)
    until(lambda: len(events("first_step")) == 2, "the trial goes on elsewhere", START_S)
    resumed_s = time.monotonic() - drained
    assert run.finish(600) == 0, run.output()
    (notice,), (_, resumed) = events("notice"), events("stream")
    assert resumed["step"] > notice["step"]
    done = [r["step"] for r in read_steps(trial.steps)]
    assert done == list(range(1, STEPS_OF_A_DRAIN + 1))
    assert len(read_records(trial.steps)) == STEPS_OF_A_DRAIN, "a step was done twice"
    (state,) = open_log(SweepFolder(run.folder.root)).trials.values()
    assert state.status == "finished"
    print(
        f"| slot drained | notice at step {notice['step']} | next step after {resumed_s:.1f} s at "
        f"{resumed['step']} |",
        flush=True,
    )
