"""The command line: `main` runs a verb and turns what ends it into one sentence and an exit status.

The verbs, and the libraries that parse and print, are imported by `main`: importing this package takes no time in
which Ctrl-C would end in a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    import typer

INTERRUPTED = 128 + signal.SIGINT


def __getattr__(name: str) -> Any:
    if name == "app":
        return _app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _app() -> typer.Typer:
    from orchestrator.cli.commands import app

    return app


def main() -> None:
    """Run the command line; expected errors end with their message, not with a traceback."""
    interrupted: list[int] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, on_interrupt)
        _repair_streams()
        status = _run()
        _flush()
    except BaseException:
        # Libraries that are interrupted during their import raise errors of other kinds.
        if not interrupted:
            raise
        status = INTERRUPTED
    if interrupted and status == INTERRUPTED:
        _say_last("interrupted")
    sys.exit(status)


def _run() -> int:
    """Run the verb that the arguments name and return its exit status."""
    from orchestrator.errors import OrchestratorError

    try:
        _app()(standalone_mode=True)
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(leaving.__context__, BrokenPipeError):
            return 0  # whoever read the output has seen enough; Typer takes it for a failure
        return code if isinstance(code, int) else 0 if code is None else 1
    except OrchestratorError as error:
        _say_error(str(error))
        return error.exit_code
    except OSError as error:
        _say_error(_in_one_sentence(error))
        return 1
    except RecursionError:
        _say_error("an input is nested too deeply to be read")
        return 2
    return 0


def _say_error(text: str) -> None:
    from orchestrator.cli.options import err
    from orchestrator.redaction import redact
    from orchestrator.report.terminal import joined, styled

    err.print(joined(styled("error:", "bold red"), " ", redact(text)), soft_wrap=True)


def _say_last(text: str) -> None:
    """Print a last line to standard error without importing anything."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _in_one_sentence(error: OSError) -> str:
    """Return `PATH: REASON` for a failed call on a file."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _repair_streams() -> None:
    """Give the process three standard streams that take any text.

    A closed one is replaced by nothing. Characters that an encoding lacks are written as escapes instead of raising.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, as long as the process lives
        elif mode == "w":
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what is still buffered; a reader that has left is no error, a full disk is one.

    Raises SystemExit with status 1 where the output cannot be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        _say_last(f"error: standard output: {error.strerror}")
        sys.exit(1)


def _discard_output() -> None:
    from orchestrator.report.terminal import discard

    discard(sys.stdout.fileno())
