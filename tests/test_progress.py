"""What the terminal shows of a run, read from its records."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.report import progress
from orchestrator.report.progress import PLAIN_EVERY_S, RETRY_S, ProgressView
from orchestrator.report.records import RecordWriter, append_event
from orchestrator.run_folder import RunFolder


class Screen:
    """A run's view on a terminal or in a log file, with a clock that is set by hand."""

    def __init__(self, folder: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = RunFolder(folder), 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.text = io.StringIO()
        console = Console(file=self.text, force_terminal=is_terminal, width=160, color_system=None)
        self.view = ProgressView(self.folder, 100, "accuracy", console)

    def steps(self, *numbers: int, step_s: float = 0.25, loss: float = 0.5) -> None:
        writer = RecordWriter(self.folder.steps)
        for number in numbers:
            writer.write(step=number, loss=loss, tokens=400, step_s=step_s, memory_bytes=2**30)
        writer.flush()

    def shown(self, after_s: float = 0.0) -> str:
        self.now += after_s
        self.view.update()
        text = self.text.getvalue()
        self.text.truncate(0)
        self.text.seek(0)
        return text


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(tmp_path, False, monkeypatch)


def test_outside_a_terminal_a_line_now_and_then_says_rate_and_time_left(log: Screen) -> None:
    append_event(log.folder.events, "imports", workers=2)
    log.steps(*range(1, 21))
    assert log.shown() == ""
    log.steps(*range(21, 41))
    assert log.shown(PLAIN_EVERY_S).split("  ") == [
        "step 40/100", "loss 0.5000", "4 steps/s", "1,600 tokens/s", "1.0 GiB/worker", "0:00:15 left\n",
    ]  # fmt: skip


def test_a_terminal_has_a_line_with_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(tmp_path, True, monkeypatch)
    append_event(screen.folder.events, "imports", workers=2)
    with screen.view:
        screen.steps(1, 2, 3)
        screen.view.update()
    text = screen.text.getvalue()
    for words in ("training", "3/100", "4 steps/s", "1,600 tokens/s", "left"):
        assert words in text


def test_what_happens_to_a_run_is_said_once(log: Screen) -> None:
    events: list[tuple[str, dict[str, Any]]] = [
        ("imports", {"workers": 2}),
        ("commit", {"folder": "step-00000010"}),
        ("warning", {"text": "checkpoint x is damaged"}),
        ("imports", {"workers": 2}),
        ("stream", {"step": 10}),
    ]
    for kind, facts in events:
        append_event(log.folder.events, kind, **facts)
    evaluations = RecordWriter(log.folder.evals)
    evaluations.write(step=10, accuracy=0.75, loss=0.4, eval_s=1.0)
    evaluations.flush()
    assert [line.strip() for line in log.shown().splitlines()] == [
        "checkpoint step-00000010",
        "warning: checkpoint x is damaged",
        "a worker was lost: the group starts again",
        "resumed at step 10",
        "step 10  held-out accuracy 0.7500  loss 0.4000  (1.0 s)",
    ]
    assert log.shown() == ""


def test_a_group_that_waits_for_room_is_not_silent(log: Screen) -> None:
    assert log.shown() == ""
    assert "no worker has started yet" in log.shown(RETRY_S + 1)
    assert log.shown(RETRY_S) == "", "once"


def test_a_loss_that_is_no_number_is_not_carried_on(log: Screen) -> None:
    append_event(log.folder.events, "imports", workers=2)
    log.steps(1, loss=float("nan"))
    log.shown()
    log.steps(2, loss=0.25)
    assert "loss 0.2500" in log.shown(PLAIN_EVERY_S)
