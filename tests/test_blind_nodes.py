"""A node that does not see the shared storage trains nothing, makes no folder, and says so."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_plan import prepared

from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.launch import workers
from orchestrator.plan import make_plan, this_machine
from orchestrator.plan.resources import Workers
from orchestrator.sweep.broker import Broker
from orchestrator.sweep.pool import RESTARTS_WITHOUT_WORK, WorkerGroupPool, serve
from orchestrator.sweep.run import sweep


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, as Ray Train would have made it."""
    import torch.distributed as dist

    engine = importlib.import_module("orchestrator.train.engine")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine, "import_ahead", lambda: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Actor:
    """An object called as Ray calls actors."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*words: Any) -> Any:
                return asyncio.run(getattr(self.one, name)(*words))

        return Method


def test_a_run_s_worker_says_where_storage_is_missing_and_makes_no_folder(
    alone: None, models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(4))
    spec = tiny.job(models.bert, rows, tmp_path, storage_path=str(tmp_path / "elsewhere"))
    plan = make_plan(spec, this_machine(), prepared())
    with pytest.raises(CheckpointError, match=r"is not there on node .* every node sees"):
        workers.work({"plan": plan.model_dump_json()})
    assert not (tmp_path / "elsewhere").exists()


def test_a_slot_on_such_a_node_takes_no_trial_and_is_given_up_with_the_reason(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, broker = tmp_path / "elsewhere" / "sweep", Actor(Broker(0))
    broker.enqueue.remote("t0", "{}", 1)
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.get_actor", lambda name: broker)
    config = {"slot": 0, "root": str(root), "broker": "broker", "work_dir": str(tmp_path)}
    groups: list[int] = []

    class Group:
        """A worker group of this process."""

        def fit(self) -> None:
            groups.append(1)
            serve(config)

    pool = WorkerGroupPool(Workers(1, 0, 1), 1, root, broker, "broker", health_timeout_s=60)
    monkeypatch.setattr(pool, "_trainer", lambda slot, workers: Group())
    pool.start()
    pool.join(30)
    assert not pool.alive()
    assert len(groups) == RESTARTS_WITHOUT_WORK
    (error,) = pool.errors
    assert "is not there on node" in str(error)
    assert not (tmp_path / "elsewhere").exists()
    assert len(broker.one._queue) == 1, "the trial is for another slot"


def test_a_sweep_too_asks_for_its_secrets_before_anything_starts(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("HUB_KEY", raising=False)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(4))
    search = {
        "space": {"optimizer.lr": [1e-4]},
        "searcher": {"type": "grid"},
        "scheduler": {"type": "none"},
    }
    spec = tiny.job(
        models.bert, rows, tmp_path, runtime={"secrets": ["HUB_KEY"]}, sweep=search,
        data={"eval_fraction": 0.5},
    )  # fmt: skip
    with pytest.raises(OrchestratorError, match="HUB_KEY not set where the driver runs"):
        sweep(spec)
