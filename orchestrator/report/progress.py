"""Progress of a run in the terminal: one live line, and lines that stay."""

from __future__ import annotations

import contextlib
import math
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from orchestrator.report.records import Tail
from orchestrator.report.terminal import joined, styled
from orchestrator.run_folder import RunFolder

PLAIN_EVERY_S = 10.0
"""Seconds between lines where the output is no terminal."""
RETRY_S = 45.0
"""Seconds after which it is said that no worker has started."""
NO_WORKERS = joined(
    styled("no worker has started yet:", "yellow"),
    " the cluster may have no room for the group (`ray status` on a cluster; other runs on this machine), or be slow. "
    "Waiting; Ctrl-C twice leaves.",
)
SMOOTHING = 0.9


class ProgressView:
    """Follows the records of a run and shows them; `update` is called a few times a second."""

    def __init__(self, folder: RunFolder, total_steps: int, metric: str, console: Console) -> None:
        self.console, self.metric, self.total_steps = console, metric, total_steps
        self._steps, self._evals, self._events = (
            Tail(path, from_end=True) for path in (folder.steps, folder.evals, folder.events)
        )
        self._step, self._memory = 0, 0
        self._loss = self._step_s = self._tokens = math.nan
        self._plain_at = time.monotonic()
        self._starts, self._resizing = 0, False
        self._wait_until = time.monotonic() + RETRY_S
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=total_steps, figures="")

    def __enter__(self) -> ProgressView:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.update()
        if self.console.is_terminal:
            self._bar.stop()

    def say(self, text: str | Text) -> None:
        """A line that stays."""
        with contextlib.suppress(OSError):  # nobody reads any more; the run goes on
            self.console.print(joined(text), soft_wrap=not self.console.is_terminal)

    def update(self) -> list[dict[str, Any]]:
        """Show what is new; returns the new step records for whoever tracks them."""
        steps = self._steps.read()
        for record in steps:
            self._absorb(record)
        for event in self._events.read():
            self._show_event(event)
        for record in self._evals.read():
            self._show_eval(record)
        if steps:
            self._show_step()
        if not self._starts and time.monotonic() > self._wait_until:
            self._wait_until = float("inf")
            self.say(NO_WORKERS)
        return steps

    def _absorb(self, record: dict[str, Any]) -> None:
        self._step, self._memory = record["step"], record["memory_bytes"]
        self._loss = _smoothed(self._loss, record["loss"])
        self._step_s = _smoothed(self._step_s, max(record["step_s"], 1e-9))
        self._tokens = _smoothed(self._tokens, record["tokens"])

    def _show_step(self) -> None:
        figures = (
            f"loss {self._loss:.4f}  {1 / self._step_s:,.3g} steps/s  {self._tokens / self._step_s:,.0f} tokens/s  "
            f"{self._memory / 2**30:.1f} GiB/worker"
        )
        self._bar.update(self._task, description="training", completed=self._step, figures=figures)
        if not self.console.is_terminal and time.monotonic() - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            left = timedelta(seconds=round((self.total_steps - self._step) * self._step_s))
            self.say(f"step {self._step}/{self.total_steps}  {figures}  {left} left")

    def _show_eval(self, record: dict[str, Any]) -> None:
        shown = [self.metric, *(k for k in ("loss", "perplexity") if k != self.metric)]
        figures = "  ".join(f"{name} {record[name]:.4f}" for name in shown if name in record)
        step = styled(f"step {record['step']}", "cyan")
        self.say(joined(step, f"  held-out {figures}  ({record['eval_s']:.1f} s)"))

    def _show_event(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "imports":
                self._starts += 1
                if self._starts > 1 and not self._resizing:
                    self.say(styled("a worker was lost: the group starts again", "yellow"))
                self._resizing = False
                self._bar.update(self._task, description="starting workers")
            case "resize":
                self._resizing = True
                self.say(
                    f"room for {event['workers']} workers: the group starts again at that size"
                )
            case "model":
                self._bar.update(self._task, description="loading model")
            case "stream":
                if event.get("step"):
                    self.say(f"resumed at step {event['step']}")
                self._bar.update(self._task, completed=event.get("step", 0))
            case "warning":
                self.say(joined(styled("warning:", "yellow"), f" {event['text']}"))
            case "commit":
                self.say(styled(f"checkpoint {event['folder']}", "dim"))


def _smoothed(before: float, new: float) -> float:
    """The moving average; it begins with the first number, and anew after what is none."""
    return new if math.isnan(before) else SMOOTHING * before + (1 - SMOOTHING) * new
