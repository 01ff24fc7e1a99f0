"""What the terminal shows while a sweep is under way, and the table of its results."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.report.gauges import SweepGauges
from orchestrator.report.records import read_records
from orchestrator.report.terminal import cells, joined, styled
from orchestrator.report.text import shown
from orchestrator.report.trial_log import SweepLog, TrialState
from orchestrator.run_folder import SweepFolder, in_use, read_json

SHOWN_TRIALS = 12
PLAIN_EVERY_S = 10.0
"""Seconds between lines where the output is no terminal."""
REFRESH_S = 1.0


class SweepView:
    """Follows the log of a sweep; `update` is called a few times a second."""

    def __init__(
        self,
        folder: SweepFolder,
        num_trials: int,
        slots: int,
        log: SweepLog,
        console: Console,
        on_cluster: bool = False,
    ) -> None:
        """`on_cluster`: also tell the cluster's metrics."""
        self.folder, self.num_trials, self.slots = folder, num_trials, slots
        self.log, self.console = log, console
        self._standing = Standing(folder)
        self._started_at = self._drawn_at = time.monotonic()
        self._ended_before = self._ended()
        self._told = len(log.order)
        self._gauges = SweepGauges(folder.name) if on_cluster else None
        self._measured = -1
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> SweepView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.update(at_once=True)
        if self.console.is_terminal:
            self._live.stop()

    def say(self, text: str | Text) -> None:
        """A line that stays."""
        self.console.print(joined(text), soft_wrap=not self.console.is_terminal)

    def update(self, at_once: bool = False) -> None:
        """Show what is new."""
        if self._gauges and self._measured != len(self.log.order):
            self._measured = len(self.log.order)
            self._gauges.told(self.log)
        if self.console.is_terminal:
            if at_once or time.monotonic() - self._drawn_at >= REFRESH_S:
                self._drawn_at = time.monotonic()
                self._live.update(self._table(), refresh=True)
            return
        for kind, trial, step in self.log.order[self._told :]:
            if kind != "trial":
                self.say(_line(self.log, self.log.trials[trial], kind, step))
        self._told = len(self.log.order)
        if time.monotonic() - self._drawn_at >= PLAIN_EVERY_S:
            self._drawn_at = time.monotonic()
            self.say(self._summary())

    def _table(self) -> Group:
        trials = list(self.log.trials.values())
        recent = [t for t in trials if t.status is None] + self.log.ranked()
        shown = list({t.id: t for t in recent}.values())[:SHOWN_TRIALS]
        head = styled(self._summary(), "bold")
        return Group(head, trials_table(self.log, shown, self._standing))

    def _summary(self) -> str:
        unended = [t for t in list(self.log.trials.values()) if t.status is None]
        running = sum(self._standing.of(t) == "running" for t in unended)
        best = self.log.best()
        parts = [f"{self._ended()} of {self.num_trials} trials ended"]
        parts.append(f"{min(running, self.slots)} of {self.slots} slots busy")
        if best is not None:
            parts.append(f"best {self.log.metric.name} {best.best:.4f} ({best.id})")
        if (left := self._left_s()) is not None:
            parts.append(f"about {left:.0f} s left")
        return "  ·  ".join(parts)

    def _ended(self) -> int:
        return sum(t.status is not None for t in list(self.log.trials.values()))

    def _left_s(self) -> float | None:
        done = self._ended() - self._ended_before
        if done < self.slots:
            return None
        rate = (time.monotonic() - self._started_at) / done
        return rate * max(self.num_trials - self._ended(), 0)


def _line(log: SweepLog, trial: TrialState, kind: str, step: int) -> str:
    if kind == "end":
        why = f": {trial.message.splitlines()[0]}" if trial.message else ""
        return f"{trial.id} {trial.status} at step {max(trial.step, step)}{why}"
    going = "" if trial.decisions[step].go_on else ", stopped here"
    return f"{trial.id} step {step}  {log.metric.name} {log.value(trial, step):.4f}{going}"


class Standing:
    """How trials of a sweep stand: what the log does not say of those without an end."""

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        try:
            self.milestones: list[float] = read_json(folder.plan)["milestones"]
        except (KeyError, TypeError, ValueError):  # none yet, or a torn one
            self.milestones = []
        launches = [r["time"] for r in read_records(folder.events) if r["kind"] == "launch"]
        self._launched_at = launches[-1] if launches and in_use(folder.root) else None

    def of(self, trial: TrialState) -> str:
        """Its end; `running`; `waiting` for a slot; `unfinished` where no sweep runs that goes on with it."""
        if trial.status is not None:
            return trial.status
        if self._launched_at is None:
            return "unfinished"
        try:
            written_at = self.folder.trial(trial.id).events.stat().st_mtime
        except OSError:
            return "waiting"
        return "running" if written_at >= self._launched_at else "waiting"

    def rung(self, trial: TrialState) -> str:
        """Rungs that it has reported at, of how many."""
        if trial.status == "finished":
            return "end"
        far = max(list(trial.keys.values()), default=0.0)
        passed = sum(far >= milestone for milestone in self.milestones)
        return f"{passed}/{len(self.milestones) + 1}"


def trials_table(log: SweepLog, trials: list[TrialState], standing: Standing) -> Table:
    """One line per trial: values, how far it got, its last and best figure."""
    paths = list(dict.fromkeys(path for t in list(log.trials.values()) for path in t.values))
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "status", "step", "rung", log.metric.name, "best"):
        table.add_column(
            styled(name), justify="right" if name not in ("trial", "status") else "left"
        )
    for path in paths:
        table.add_column(styled(path.rpartition(".")[2]), justify="right", style="dim")
    best = log.best()
    for trial in trials:
        last = f"{log.value(trial, trial.step):.4f}" if trial.reports else ""
        style = "bold green" if best is not None and trial.id == best.id else ""
        figures = ("" if trial.best is None else f"{trial.best:.4f}",)
        values = (shown(trial.values.get(path)) for path in paths)
        known = (trial.id, standing.of(trial), str(trial.step), standing.rung(trial), last)
        table.add_row(*cells(*known, *figures, *values), style=style)
    return table


def results_table(log: SweepLog, folder: SweepFolder) -> Group:
    """All trials, best first, then those that reported nothing."""
    ranked = log.ranked()
    rest = [t for t in log.trials.values() if t.best is None]
    launches = [r for r in read_records(folder.events) if r["kind"] == "launch"]
    title = f"{folder.name}: {len(log.trials)} trials, {len(launches)} launch(es)"
    return Group(styled(title, "bold"), trials_table(log, ranked + rest, Standing(folder)))
