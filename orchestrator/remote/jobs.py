"""Submit, follow and stop jobs on a cluster."""

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
    check_capacity,
    check_driver_resources,
    job_in,
    make_request,
    plan_locally,
)
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

STOPPED_EXIT_CODE = 130
POLL_S = 0.5
RECONNECT_S = 60
"""Seconds that a head may be unreachable, for example while it restarts, before `follow` fails."""
PENDING_S = 10
"""Seconds that `stop` waits for a job that has not started."""
STOP_MARGIN_S = 15
"""Seconds beyond the job's own stop time that Ray may need to record its end."""

Say = Callable[[str], None]


def submit(
    spec: JobSpec,
    job: Path,
    overrides: Sequence[str],
    head: Head,
    name: str | None = None,
    say: Say = print,
) -> JobRequest:
    """Check the job against the cluster, pack the working directory and submit. Return the request.

    Raises:
        SpecError: The job file is outside the working directory.
        PlanError: The cluster can never satisfy the request.
        OrchestratorError: The package is too large.
        RemoteError: The cluster cannot be reached or refuses the job.
    """
    root = Path.cwd()
    job_path = job_in(root, job)
    check_driver_resources(spec, head.resources())
    cluster = head.cluster()
    say(check_capacity(spec, cluster))
    if spec.sweep is None and (plan := plan_locally(spec, cluster)) is not None:
        memory = f"{_gib(sum(plan.memory_bytes.values()))} of {_gib(plan.memory_limit_bytes)}"
        say(f"{plan.total_steps} steps; {memory} per worker")
    with tempfile.TemporaryDirectory() as folder:
        files = files_to_pack(root, spec, job_path)
        package = pack(root, files, Path(folder) / "package.zip")
        say(f"{len(files)} files, {package.stat().st_size / 2**20:.1f} MiB packed")
        request = make_request(spec, job_path, overrides, str(package), name)
        head.submit(request)
    return request


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def follow(head: Head, submission_id: str, write: Callable[[str], Any]) -> JobDetails:
    """Write the job's output as it arrives, and return the details of the ended job.

    A broken connection is reopened for up to RECONNECT_S seconds. No output is written twice.
    """
    log = _Log(head, submission_id, write)
    while True:
        error = log.tail()
        info = _details(head, submission_id)
        if info.status.is_terminal():
            log.catch_up()
            return info
        time.sleep(POLL_S if error is None else 2 * POLL_S)


class _Log:
    """The output of a job, and the number of characters written so far."""

    def __init__(self, head: Head, submission_id: str, write: Callable[[str], Any]) -> None:
        self.head, self.submission_id, self.write = head, submission_id, write
        self.written = 0

    def tail(self) -> Exception | None:
        """Follow until the connection ends, and return the error that broke it."""
        import aiohttp

        try:
            asyncio.run(self._tail())
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            return error
        return None

    async def _tail(self) -> None:
        seen = 0  # every connection starts at the beginning of the log
        async for text in self.head.jobs.tail_job_logs(self.submission_id):
            seen += len(text)
            self._write(text, seen)

    def catch_up(self) -> None:
        """Write the output between the last connection and the end."""
        text = self.head.logs(self.submission_id)
        self._write(text, len(text))

    def _write(self, text: str, seen: int) -> None:
        new = seen - self.written
        if new > 0:
            self.write(text[-new:])
            self.written = seen


def _details(head: Head, submission_id: str) -> JobDetails:
    """Return the job's details from a head that may be restarting."""
    deadline = time.monotonic() + RECONNECT_S
    while True:
        try:
            return head.job(submission_id)
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2 * POLL_S)


def exit_code(info: JobDetails) -> int:
    """Return the driver's exit code: 128 + n if signal n killed it, 130 if the job was stopped."""
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
    """Request that a job commits a checkpoint and exits. Return its last status.

    A running job gets the stop time it was submitted with; after that Ray kills it. A pending job cannot be
    stopped over HTTP: Ray keeps the request and stops the job when it starts.

    Raises:
        RemoteError: A running job does not end in time.
    """
    info = head.job(submission_id)
    if info.status.is_terminal():
        return str(info.status.value)
    pending = info.status.value == "PENDING"
    limit_s = stop_wait_s(info)
    if not pending and limit_s is None:
        say(
            "the job was submitted without RAY_JOB_STOP_WAIT_TIME_S: Ray kills it after 3 s, "
            "which may be too short for a checkpoint"
        )
    with head.translated_errors():
        head.jobs.stop_job(submission_id)
    deadline = time.monotonic() + (PENDING_S if pending else (limit_s or 3) + STOP_MARGIN_S)
    while time.monotonic() < deadline:
        info = head.job(submission_id)
        if info.status.is_terminal():
            return str(info.status.value)
        if pending and info.status.value == "RUNNING":
            return stop(head, submission_id, say)
        time.sleep(POLL_S)
    if pending:
        say(
            "the job has not started. Ray keeps the request and stops the job when it starts, or fails it after "
            "15 minutes (RAY_JOB_START_TIMEOUT_SECONDS of the head)"
        )
        return str(info.status.value)
    raise RemoteError(
        f"{submission_id} is still running {(limit_s or 3) + STOP_MARGIN_S} s after the stop request. "
        f"See orchestrator logs {submission_id}"
    )


def stop_wait_s(info: JobDetails) -> int | None:
    """Return the seconds between Ray's stop request and the kill, or None if the job does not set them."""
    variables = (info.runtime_env or {}).get("env_vars") or {}
    text = variables.get("RAY_JOB_STOP_WAIT_TIME_S")
    return int(text) if text else None
