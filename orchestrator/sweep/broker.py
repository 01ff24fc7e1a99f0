"""The one actor between Tune's trial proxies and the slots: who runs what, what was reported, what was said."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

IDLE_S = 15.0
"""A slot that has nothing to do asks again after this long: its ranks wait in a collective meanwhile."""


@dataclass(frozen=True)
class Task:
    """A trial to run: its plan as JSON, and the workers it needs."""

    trial: str
    plan: str
    num_workers: int


class Broker:
    """An async Ray actor. Holds nothing that is not in the log or in the trials' run folders."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._spoken: dict[tuple[str, int], tuple[bool, bool]] = {}
        self._queue: deque[Task] = deque()
        self._held: dict[int, Task] = {}
        self._failures: dict[str, int] = defaultdict(int)
        self._last_words: dict[str, str] = {}
        self._crashed_at: dict[str, str] = {}
        self._non_retryable: set[str] = set()
        self._said: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._drained: set[int] = set()
        self._came: set[int] = set()
        self._given_up: set[str] = set()
        self._refusals: dict[int, str] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[tuple[bool, bool]]] = {}
        self._news: dict[str, asyncio.Event] = {}
        """What those who follow a trial wait for: one trial's news must not wake all the others."""
        self._changed = asyncio.Event()
        """What slots without work wait for."""
        self._slot_came = asyncio.Event()
        self._closing = False
        self._cancelled = False

    # what the driver calls

    async def remember(self, spoken: dict[str, dict[int, tuple[bool, bool]]]) -> None:
        """Verdicts of an earlier launch, by trial and step; a replayed step gets the same answer."""
        self._spoken |= {
            (trial, step): decision
            for trial, by_step in spoken.items()
            for step, decision in by_step.items()
        }

    async def enqueue(self, trial: str, plan: str, num_workers: int) -> None:
        """A trial is ready to run."""
        if self._cancelled:
            self._say(_end(trial, "stopped", 0, ""))
            return
        self._queue.append(Task(trial, plan, num_workers))
        self._wake()

    async def fail(self, trial: str, message: str) -> None:
        """A trial cannot run at all."""
        self._say(_end(trial, "failed", 0, message))

    async def decision(self, trial: str, step: int, go_on: bool, save: bool) -> None:
        """The answer to a report."""
        self._spoken[trial, step] = (go_on, save)
        waiting = self._waiting.pop((trial, step), None)
        if waiting is not None and not waiting.done():
            waiting.set_result((go_on, save))

    async def slot_came(self) -> None:
        """Return when the first slot asks for work, or when none is needed any more."""
        await self._slot_came.wait()

    async def wanted(self) -> int | None:
        """Workers that a free slot should have for what comes next; None where nothing will."""
        while not self._queue and not self._closing:
            await _within(IDLE_S, self._changed)
        return self._queue[0].num_workers if self._queue else None

    async def cancel(self) -> None:
        """The sweep is stopping: what no slot has begun is not begun."""
        self._cancelled = True
        self._slot_came.set()
        while self._queue:
            trial = self._queue.popleft().trial
            self._say(_end(trial, "stopped", 0, ""))

    async def give_up(self, trial: str) -> None:
        """Nobody will judge this trial any more."""
        self._given_up.add(trial)
        for key in [key for key in self._waiting if key[0] == trial]:
            await self.decision(*key, go_on=False, save=False)

    async def lost(self, slot: int) -> None:
        """A slot's worker group is gone. What it held is for whichever slot is free first."""
        self._take_back(slot)

    async def came(self, slot: int) -> bool:
        """Whether workers of this slot have asked for work since this was asked last."""
        found = slot in self._came
        self._came.discard(slot)
        return found

    async def refusal(self, slot: int) -> str | None:
        """Why this slot's workers could not take any work, if they said so."""
        return self._refusals.pop(slot, None)

    async def release(self) -> None:
        """Nobody will judge any more: those who wait for a decision are let go."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result((False, False))
        self._waiting.clear()

    async def close(self) -> None:
        """Nothing more will come: slots leave when they ask."""
        self._closing = True
        self._wake()

    # what a trial proxy calls

    async def next_report(self, trial: str, heard: int) -> tuple[int, dict[str, Any]]:
        """What a trial says after the first `heard` things: a report that has no decision, or its end.

        Also how many things have been heard with it. A trial proxy that was lost and started again
        begins at 0: what it had taken, and nobody has answered, is handed out again.
        """
        while True:
            for count, said in enumerate(self._said[trial][heard:], heard + 1):
                if said["kind"] == "end" or (trial, said["step"]) not in self._spoken:
                    return count, said
            heard = len(self._said[trial])
            await _within(IDLE_S, self._news.setdefault(trial, asyncio.Event()))

    # what rank 0 of a slot calls

    async def next_task(self, slot: int, num_workers: int) -> dict[str, Any]:
        """What a slot does next: `run` a plan, `idle`, or `leave`.

        A slot that asks while it holds a trial was lost while running it.
        """
        self._slot_came.set()
        self._came.add(slot)
        self._take_back(slot)
        deadline = time.monotonic() + IDLE_S
        while (left := deadline - time.monotonic()) > 0:
            if self._closing and not self._queue:
                return {"kind": "leave"}
            if self._queue:
                task = next((t for t in self._queue if t.num_workers == num_workers), None)
                if task is None:
                    return {"kind": "leave"}  # to come back with as many workers as are wanted
                self._queue.remove(task)
                self._held[slot] = task
                return {"kind": "run", "trial": task.trial, "plan": task.plan}
            await _within(left, self._changed)
        return {"kind": "idle"}

    async def refuse(self, slot: int, why: str) -> None:
        """The slot's workers are where no trial can run."""
        self._refusals[slot] = why

    async def report(
        self, trial: str, step: int, metrics: dict[str, Any], last: bool
    ) -> tuple[bool, bool]:
        """Pass a report on and wait for (go on, save). A step that was judged before is not passed on."""
        known = self._spoken.get((trial, step))
        if known is not None:
            return known
        if trial in self._given_up:
            return False, False
        answer = asyncio.get_running_loop().create_future()
        self._waiting[trial, step] = answer
        self._say(
            {"kind": "report", "trial": trial, "step": step, "metrics": metrics, "last": last}
        )
        return await answer

    async def ended(self, slot: int, trial: str, status: str, step: int, message: str) -> None:
        """A trial left its slot. `stopped` is no end: it may go on another day."""
        self._held.pop(slot, None)
        self._drained.discard(slot)
        self._say(_end(trial, status, step, message))

    async def drained(self, slot: int) -> None:
        """A node of this slot will be taken away: the workers lost with it count against no trial."""
        self._drained.add(slot)

    async def crashed(self, trial: str, message: str, where: str | None = None) -> None:
        """What a worker said before it died. A trial that dies twice at the same place (`where`, None for
        what may go better next time) is not tried again."""
        self._last_words[trial] = message
        if where is not None and where == self._crashed_at.get(trial):
            self._non_retryable.add(trial)
        if where is not None:
            self._crashed_at[trial] = where

    def _take_back(self, slot: int) -> None:
        """Queue what a lost slot held, first in line, unless it has cost too many workers."""
        task = self._held.pop(slot, None)
        if task is None:
            return
        self._failures[task.trial] += slot not in self._drained
        self._drained.discard(slot)
        if self._failures[task.trial] > self._max_failures or task.trial in self._non_retryable:
            self._say(_end(task.trial, "failed", 0, self._lost(task)))
        elif self._cancelled:
            self._say(_end(task.trial, "stopped", 0, ""))
        else:
            self._queue.appendleft(task)
            self._wake()

    def _say(self, said: dict[str, Any]) -> None:
        self._said[said["trial"]].append(said)
        news = self._news.pop(said["trial"], None)
        if news is not None:
            news.set()

    def _lost(self, task: Task) -> str:
        words = self._last_words.get(task.trial, "no last words: killed, or out of memory")
        return f"its workers were lost {self._failures[task.trial]} times: {words}"

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _within(timeout_s: float, event: asyncio.Event) -> None:
    """Wait for an event, but not for ever."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return


def _end(trial: str, status: str, step: int, message: str) -> dict[str, Any]:
    return {"kind": "end", "trial": trial, "status": status, "step": step, "message": message}
