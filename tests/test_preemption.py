"""PreemptionMonitor of a node that will be taken away: when it is asked for, and when the group leaves."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.run_folder import RunFolder
from orchestrator.train import preemption
from orchestrator.train.preemption import EARLY_S, OVERDUE_S, PreemptionMonitor
from orchestrator.train.state import Pulse
from orchestrator.train.trial import Trial


class Clock:
    """Time that moves when it is told to, or slept through."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    fake = SimpleNamespace(time=one.time, monotonic=one.time, sleep=one.sleep)
    monkeypatch.setattr(preemption, "time", fake)
    return one


def test_rank_0_s_clock_decides_when_to_ask_and_when_to_leave(clock: Clock) -> None:
    deadlines = iter([None, clock.now + 60, clock.now + 60])
    first, other = PreemptionMonitor(lambda: next(deadlines), 0), PreemptionMonitor(lambda: None, 1)
    assert not first.due(), "just started"
    clock.sleep(preemption.ASK_EVERY_S)
    assert first.due()
    assert not other.due(), "the pulse tells the others"
    assert not first.heard()
    assert not first.due(), "asked a moment ago"
    assert first.heard(), "a deadline"
    assert not first.heard(), "the same deadline is no news"
    assert not first.over()
    clock.now = (first.deadline_s or 0) - EARLY_S
    assert first.over()
    assert not other.over()


def test_an_earlier_deadline_is_news_and_a_slow_commit_makes_the_group_leave_earlier(
    clock: Clock,
) -> None:
    deadlines = iter([clock.now + 60, clock.now + 30])
    one = PreemptionMonitor(lambda: next(deadlines), 0)
    assert one.heard()
    assert one.heard()
    one.commit_s = 10
    clock.sleep(9.9)
    assert not one.over()
    clock.sleep(0.2)
    assert one.over(), "twice the time of a commit before the deadline"


def test_a_node_that_stays_after_all_does_not_hold_its_workers_for_ever(clock: Clock) -> None:
    one = PreemptionMonitor(lambda: 1010.0, 0)
    assert one.heard()
    with pytest.raises(RuntimeError, match="still here"):
        one.wait_to_be_taken()
    assert clock.now == pytest.approx(1010 + OVERDUE_S, abs=1)


def test_without_a_cluster_to_ask_nothing_is_asked(clock: Clock) -> None:
    one = PreemptionMonitor(None, 0)
    clock.sleep(100)
    assert not one.due()
    assert not one.heard()


def test_every_reason_in_the_pulse_arrives_as_itself(tmp_path: Path) -> None:
    """One rank, no engine: what goes into the all-reduce comes out under the same name."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for name in ("stop", "handover", "storage_failed", "ask", "leave"):
            trial = object.__new__(Trial)
            trial.rank, trial.folder = 0, RunFolder(tmp_path / name)
            trial.folder.root.mkdir()
            if name in ("stop", "handover"):
                path = {
                    "stop": trial.folder.stop_request,
                    "handover": trial.folder.handover_request,
                }
                path[name].touch()
            trial.resumed_at_s, trial.started_at = 40.0, time.monotonic() - 2.0
            trial.writer = cast(Any, SimpleNamespace(failed=lambda n=name: n == "storage_failed"))
            trial.engine = SimpleNamespace(device=torch.device("cpu"))
            trial.notice = cast(
                Any,
                SimpleNamespace(due=lambda n=name: n == "ask", over=lambda n=name: n == "leave"),
            )
            pulse = trial._pulse((1.5, 1.25), 7)
            assert (pulse.loss_sum, pulse.task_loss_sum, pulse.tokens) == (1.5, 1.25, 7)
            assert pulse.elapsed_s == pytest.approx(42.0, abs=1.0)
            flags = {f: on for f in fields(pulse) if isinstance(on := getattr(pulse, f), bool)}
            assert [f for f, on in flags.items() if on] == [name]
    finally:
        dist.destroy_process_group()


def fields(pulse: Pulse) -> list[str]:
    """Names of a pulse's fields."""
    return [f.name for f in dataclasses.fields(pulse)]
