"""Signals that ask a run to end: from the terminal, from whoever ends the process, from a lost connection."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals after which the workers commit a checkpoint and leave."""


@contextmanager
def stop_on_signals(ask: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP `ask` the workers to commit and leave; a second one quits at once.

    A signal that was ignored when the process started stays ignored, as SIGHUP under `nohup`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if not ask():
            raise KeyboardInterrupt
        say(
            f"{signal.Signals(number).name}: finishing the step and committing a checkpoint "
            "(once more quits at once)"
        )

    with _handled(ASKING, on_signal):
        yield


@contextmanager
def hangup_ends() -> Iterator[None]:
    """Inside, SIGHUP ends the process as SIGTERM does, with all that has to be cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        leave_terminal()
        raise SystemExit(128 + number)

    with _handled((signal.SIGHUP,), on_signal):
        yield


@contextmanager
def hangup_blocked() -> Iterator[None]:
    """Inside, SIGHUP waits in this thread; processes that it starts never get it.

    The kernel sends it to every process of a terminal that closes. Ray's must live on until the workers
    have committed a checkpoint; they end with this process anyway.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_terminal() -> None:
    """Write to nowhere what would go to a terminal that is gone: each write would be an error."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            with suppress(OSError):
                if stat.S_ISCHR(os.fstat(number).st_mode):
                    os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def _handled(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, Any], None]
) -> Iterator[None]:
    """Handle signals inside the block, but for those that this process ignores."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
