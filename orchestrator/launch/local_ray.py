"""A Ray of our own on this machine: started with retries, explained where it does not come up."""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.launch import ray_start

LIMITS_S = (60.0, 120.0, 240.0)
"""Seconds that each stage of a start may take, by attempt."""
PAUSE_S = 2.0
"""Before the second attempt; twice that before the third."""
SHOWN_LINES, SHOWN_CHARACTERS = 6, 300
SEVERE = re.compile(r"\[[^]]* [CEF] \d")
STACK = re.compile(r"Stack trace|\*\*\* SIG|\s@\s+0x|PC: @")


@dataclass(frozen=True)
class Cause:
    """Why a start failed, what to type, and whether another attempt may succeed."""

    why: str
    fix: str
    again: bool


BUSY = Cause(
    "its processes did not come up in time",
    "a machine with far more work than cores is too slow: end other work and run the same command again",
    again=True,
)
CAUSES: tuple[tuple[re.Pattern[str], Cause], ...] = (
    (
        re.compile(r"permission denied|read-only file system|errno 13|errno 30", re.I),
        Cause(
            "a file or folder cannot be written",
            "name a folder that you may write to: export RAY_TMPDIR=/a/short/folder",
            again=False,
        ),
    ),
    (
        re.compile(r"AF_UNIX|path(name)? (is )?too long|file ?name too long", re.I),
        Cause(
            "the path of a socket is longer than 107 bytes",
            "name a shorter folder: export RAY_TMPDIR=/tmp",
            again=False,
        ),
    ),
    (
        re.compile(r"no space left|disk quota|errno 28", re.I),
        Cause(
            "no space is left for Ray's files",
            "free some in /dev/shm and in the temporary folder (df -h /dev/shm /tmp); in a container run with "
            "--shm-size=4g; or name another folder: export RAY_TMPDIR=/a/short/folder",
            again=False,
        ),
    ),
    (
        re.compile(r"too many open files|errno 24", re.I),
        Cause(
            "too few file descriptors are allowed",
            "allow more: ulimit -n 65536",
            again=False,
        ),
    ),
    (
        re.compile(r"resource temporarily unavailable|can't start new thread|errno 11\b", re.I),
        Cause(
            "too few processes or threads are allowed",
            "allow more: ulimit -u 16384; in a container raise its limit of pids",
            again=False,
        ),
    ),
    (
        re.compile(r"cannot allocate memory|out of memory|errno 12\b", re.I),
        Cause("memory is not available", "end other work, or use a larger machine", again=False),
    ),
    (
        re.compile(r"address already in use|failed to bind|bind address|errno 98", re.I),
        Cause(
            "a port is in use by another process",
            "end it, or run the same command again: other ports are chosen",
            again=True,
        ),
    ),
)
"""What the error or Ray's logs say → the cause. Anything else is taken for a machine that is too busy."""


def start(ray: Any, folder: Path, cpus: int, python: str) -> None:
    """Start Ray's processes, with longer limits where a first attempt fails.

    Args:
        ray: the imported module.
        folder: an empty folder for sockets and logs, which stay there where the start fails.
        cpus: logical CPUs of the node.
        python: the command that starts a worker.

    Raises:
        OrchestratorError: with the cause, the end of the raylet's log and what to do.
    """
    _ensure_token()
    for attempt, limit_s in enumerate(LIMITS_S, start=1):
        session = folder / str(attempt)
        session.mkdir(exist_ok=True)
        try:
            ray_start.init(
                ray,
                session,
                limit_s,
                num_cpus=cpus,
                runtime_env={"py_executable": python},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises no class of its own
            last = raylet_log(session)
            cause = cause_of(error, last)
            clean_up(ray, session)
            if not cause.again or attempt == len(LIMITS_S):
                raise OrchestratorError(_message(error, cause, attempt, session, last)) from error
            time.sleep(PAUSE_S * attempt)


def cause_of(error: Exception, log: list[str]) -> Cause:
    """Return the cause that an exception or the end of the raylet's log names."""
    if isinstance(error, OSError) and error.errno is not None:
        text = f"errno {error.errno} {os.strerror(error.errno)} {error}"
    else:
        text = str(error)
    for source in (text, "\n".join(log)):
        for pattern, cause in CAUSES:
            if pattern.search(source):
                return cause
    return BUSY


def raylet_log(session: Path) -> list[str]:
    """Return the last lines that Ray's processes wrote about what is wrong, without stack traces."""
    lines: list[str] = []
    for name in ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out"):
        for log in session.glob(f"session_[0-9]*/logs/{name}"):
            with suppress(OSError):
                found = log.read_text(encoding="utf-8", errors="replace").splitlines()
                lines += [
                    line[:SHOWN_CHARACTERS]
                    for line in found
                    if SEVERE.match(line) and not STACK.search(line)
                ]
    return list(dict.fromkeys(lines))[-SHOWN_LINES:]


def clean_up(ray: Any, session: Path) -> None:
    """End what a failed start left; its logs stay."""
    with suppress(Exception):  # half of it was never there
        ray.shutdown()
    ray_start.kill_processes_of(session)


def _message(error: Exception, cause: Cause, attempts: int, session: Path, log: list[str]) -> str:
    tries = f" in {attempts} attempts" if attempts > 1 else ""
    known = {
        ray_start.RayletDied: "the raylet ended before it had registered",
        ray_start.StartTimeout: f"the node had not registered after {LIMITS_S[attempts - 1]:.0f} s",
    }
    first = known.get(type(error)) or (str(error).strip() or type(error).__name__).splitlines()[0]
    said = "".join(f"\n  {line}" for line in log)
    return (
        f"Ray did not start on this machine{tries}: {cause.why} ({first}){said}\n"
        f"  Logs: {session}\n  To do: {cause.fix}"
    )


TOKEN = secrets.token_hex(32)
"""One per process: Ray reads it once."""


def _ensure_token() -> None:
    """Give Ray a token of this process where its own file cannot be written, as with a read-only home."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    wanted = os.environ.get("RAY_AUTH_MODE", "token") == "token"
    if wanted and not named and not _home_holds_token():
        os.environ["RAY_AUTH_TOKEN"] = TOKEN


def _home_holds_token() -> bool:
    """Return whether Ray's token file exists or can be made."""
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return os.access(folder / "auth_token", os.R_OK)
        folder.mkdir(exist_ok=True)
        return os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: no home at all
        return False
