"""The verbs for jobs on a cluster: submit, follow, stop."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.remote.head import Head, RemoteError, UnreachableError
from orchestrator.remote.package import files_to_pack, pack
from orchestrator.remote.request import (
    JobRequest,
    job_in,
    make_request,
    must_fit,
    must_offer,
    plan_from_here,
)
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

STOPPED_EXIT_CODE = 130
POLL_S = 0.5
LOST_S = 60
"""How long a head may be away (restarting, say) before following gives up."""
PENDING_S = 10
"""How long `stop` waits for a job that has not started yet."""
STOP_MARGIN_S = 15
"""What Ray's own bookkeeping may take on top of the time that the job has."""

Say = Callable[[str], None]


def submit(
    spec: JobSpec,
    job: Path,
    overrides: Sequence[str],
    head: Head,
    name: str | None = None,
    say: Say = print,
) -> JobRequest:
    """Plan what can be planned, pack the working directory, submit. Returns what was asked.

    Raises SpecError, PlanError (the cluster can never give it), OrchestratorError (the package is too
    large) and RemoteError.
    """
    root = Path.cwd()
    inside = job_in(root, job)
    must_offer(spec, head.resources())
    cluster = head.cluster()
    say(must_fit(spec, cluster))
    if spec.sweep is None and (plan := plan_from_here(spec, cluster)) is not None:
        filled = f"{_gib(sum(plan.memory_bytes.values()))} of {_gib(plan.memory_limit_bytes)}"
        say(f"{plan.total_steps} steps; {filled} per worker")
    with tempfile.TemporaryDirectory() as folder:
        files = files_to_pack(root, spec, inside)
        package = pack(root, files, Path(folder) / "package.zip")
        say(f"{len(files)} files, {package.stat().st_size / 2**20:.1f} MiB packed")
        request = make_request(spec, inside, overrides, str(package), name)
        head.submit(request)
    return request


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def follow(head: Head, submission_id: str, write: Callable[[str], Any]) -> JobDetails:
    """Write the job's output as it comes; returns how the job ended.

    A connection that breaks is opened again for LOST_S; what was written is not written twice.
    """
    log = _Log(head, submission_id, write)
    while True:
        lost = log.tail()
        info = _ask(head, submission_id)
        if info.status.is_terminal():
            log.catch_up()
            return info
        time.sleep(POLL_S if lost is None else 2 * POLL_S)


class _Log:
    """What of a job's output has been written so far."""

    def __init__(self, head: Head, submission_id: str, write: Callable[[str], Any]) -> None:
        self.head, self.submission_id, self.write = head, submission_id, write
        self.written = 0

    def tail(self) -> Exception | None:
        """Follow until the connection ends; returns what broke it."""
        import aiohttp

        try:
            asyncio.run(self._tail())
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            return error
        return None

    async def _tail(self) -> None:
        seen = 0  # every connection starts at the log's beginning
        async for text in self.head.jobs.tail_job_logs(self.submission_id):
            seen += len(text)
            self._write(text, seen)

    def catch_up(self) -> None:
        """Write what came between the last connection and the end."""
        text = self.head.logs(self.submission_id)
        self._write(text, len(text))

    def _write(self, text: str, seen: int) -> None:
        new = seen - self.written
        if new > 0:
            self.write(text[-new:])
            self.written = seen


def _ask(head: Head, submission_id: str) -> JobDetails:
    """The job's state, from a head that may be restarting."""
    deadline = time.monotonic() + LOST_S
    while True:
        try:
            return head.job(submission_id)
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2 * POLL_S)


def exit_code(info: JobDetails) -> int:
    """The job's own exit status: the driver's, 128 + n where signal n killed it, 130 where it was stopped."""
    status = info.status.value
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return STOPPED_EXIT_CODE
    code = info.driver_exit_code
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


def stop(head: Head, submission_id: str, say: Say = print) -> str:
    """Ask a job to commit a checkpoint and leave; returns its status in the end.

    A running job gets the time it was submitted with, and Ray kills it after that. A pending one cannot be
    ended over HTTP: Ray keeps the request and stops the job in the moment it starts.
    Raises RemoteError where a running job does not end.
    """
    info = head.job(submission_id)
    if info.status.is_terminal():
        return str(info.status.value)
    pending = info.status.value == "PENDING"
    given_s = stop_wait_s(info)
    if not pending and given_s is None:
        say(
            "this job was submitted without RAY_JOB_STOP_WAIT_TIME_S: Ray kills it after 3 s, "
            "which may be too short for a checkpoint"
        )
    with head.in_words():
        head.jobs.stop_job(submission_id)
    deadline = time.monotonic() + (PENDING_S if pending else (given_s or 3) + STOP_MARGIN_S)
    while time.monotonic() < deadline:
        info = head.job(submission_id)
        if info.status.is_terminal():
            return str(info.status.value)
        if pending and info.status.value == "RUNNING":
            return stop(head, submission_id, say)
        time.sleep(POLL_S)
    if pending:
        say(
            "the job has not started yet. The request stands: it ends when it would start, at the latest "
            "when Ray gives up starting it (15 minutes, RAY_JOB_START_TIMEOUT_SECONDS of the head)"
        )
        return str(info.status.value)
    raise RemoteError(f"{submission_id} has not ended {given_s or 3} s after it was asked to")


def stop_wait_s(info: JobDetails) -> int | None:
    """Seconds that Ray gives this job between asking and killing; None where it was not said."""
    variables = (info.runtime_env or {}).get("env_vars") or {}
    text = variables.get("RAY_JOB_STOP_WAIT_TIME_S")
    return int(text) if text else None
