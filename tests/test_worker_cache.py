"""What a worker keeps from trial to trial, and what it gives back: nothing of one trial is in the next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_plan import changed

from orchestrator.errors import PlanError
from orchestrator.model.build import build_model
from orchestrator.spec import JobSpec
from orchestrator.train import trial as trial_module
from orchestrator.train.state import memory_in_use_bytes
from orchestrator.train.trial import run_trial
from orchestrator.train.worker_cache import GROWTH, SETTLED_TRIALS, WorkerCache

LABELS = ("bad", "good")
SEARCHED = (
    (), ("model.dropout=0.3",), ("tuning.type=lora", "tuning.r=2"), ("tuning.type=lora", "tuning.r=4"),
    ("tuning.type=lora", "tuning.r=4", "seed=2"),
    ("tuning={type: full, freeze: ['*embeddings*']}",), ("optimizer.lr=0.1",), (),
)  # fmt: skip


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("warm")
    return tiny.job(models.bert, tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4)), folder)


def facts(model: Any) -> tuple[Any, ...]:
    trained = tuple((name, p.requires_grad) for name, p in model.named_parameters())
    drops = tuple(m.p for m in model.modules() if type(m).__name__ == "Dropout")
    return trained, drops, {k: v.clone() for k, v in model.state_dict().items()}


def test_each_trial_starts_from_the_model_of_its_own_job_as_if_it_were_loaded(
    spec: JobSpec,
) -> None:
    import torch

    warm = WorkerCache()
    for overrides in SEARCHED:
        job: Any = SimpleNamespace(spec=changed(spec, *overrides), labels=LABELS)
        torch.manual_seed(job.spec.seed)
        trained, drops, want = facts(build_model(job.spec, LABELS))
        for _ in range(2):  # read, and then copied
            torch.manual_seed(job.spec.seed)
            model = warm.model(job)
            found = facts(model)
            assert found[:2] == (trained, drops), overrides
            assert found[2].keys() == want.keys()
            assert all(torch.equal(found[2][name], want[name]) for name in want), overrides
            for parameter in model.parameters():  # what training would do to it
                parameter.data.add_(1)


def test_a_trial_that_cannot_be_set_up_gives_back_what_it_had_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def fail(*_: Any) -> None:
        raise PlanError("no model of that name")

    monkeypatch.setattr(trial_module, "at_workers", lambda plan, _: plan)
    ranks = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(trial_module, "dist", ranks)
    monkeypatch.setattr(trial_module, "find_checkpoint", lambda *_: None)
    monkeypatch.setattr(trial_module, "open_writer", lambda *_: None)
    stream = SimpleNamespace(close=lambda: closed.append("stream"))
    monkeypatch.setattr(trial_module, "open_stream", lambda *_: stream)
    monkeypatch.setattr(trial_module, "open_model", fail)
    plan: Any = SimpleNamespace()
    result = run_trial(plan, trial_module.RunFolder(tmp_path))
    assert (result.status, result.message) == ("failed", "no model of that name")
    assert closed == ["stream"]


def test_a_slot_that_has_grown_gives_freed_memory_back() -> None:
    def used() -> int:
        return memory_in_use_bytes(torch.device("cpu"))

    warm = WorkerCache()
    for _ in range(SETTLED_TRIALS):
        warm.trial_ended()
    settled = used()
    blocks = [b"x" * 100_000 for _ in range(1000 + settled // 500_000)]
    del blocks[:-1]  # the last one holds the heap's end in its place
    assert used() > GROWTH * settled
    warm.trial_ended()
    assert used() < GROWTH * settled
    assert blocks
