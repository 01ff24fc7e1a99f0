"""Talk to the head of a Ray cluster over HTTP, and turn its errors into messages with a fix."""

from __future__ import annotations

import builtins
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.plan.cluster import Cluster, ray_cluster

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

    from orchestrator.remote.request import JobRequest

RAY_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that override the address given to Ray's clients."""


class RemoteError(OrchestratorError):
    """The cluster cannot be reached, refuses the request, or does not know the job."""


class UnreachableError(RemoteError):
    """The head does not answer: the address is wrong, or the head is down or restarting."""


class Head:
    """A connection to one head's Jobs API. The constructor and all methods may raise RemoteError."""

    def __init__(self, address: str) -> None:
        self.address = http_address(address)
        self.token, self.token_from = find_token()
        self.headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with self.translated_errors(), _without(RAY_OVERRIDES):
            from ray.job_submission import JobSubmissionClient

            for module in ("job.sdk", "dashboard_sdk"):  # importing them sets INFO
                logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
            self.jobs: JobSubmissionClient = JobSubmissionClient(
                self.address, headers=dict(self.headers)
            )

    def cluster(self) -> Cluster:
        """Return the living nodes as the plan counts them."""
        return ray_cluster(f"Ray cluster at {self.address}", self.resources())

    def resources(self) -> builtins.list[dict[str, float]]:
        """Return the resources of each living node, by Ray's names."""
        from ray.util.state.api import StateApiClient
        from ray.util.state.common import ListApiOptions, StateResource

        with self.translated_errors(), _without(RAY_OVERRIDES):
            client = StateApiClient(self.address, headers=dict(self.headers))
            nodes: builtins.list[Any] = client.list(
                StateResource.NODES, ListApiOptions(limit=10_000), raise_on_missing_output=False
            )
        return [n["resources_total"] for n in nodes if n["state"] == "ALIVE"]

    def submit(self, request: JobRequest) -> str:
        """Upload the package, submit the job and return its submission id."""
        with self.translated_errors():
            return self.jobs.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env=request.runtime_env,
                metadata={"run": request.run},
                entrypoint_num_cpus=request.driver_cpus,
                entrypoint_memory=request.driver_memory_bytes,
                entrypoint_resources=request.driver_resources or None,
            )

    def job(self, submission_id: str) -> JobDetails:
        """Return the details of a job."""
        with self.translated_errors():
            return self.jobs.get_job_info(submission_id)

    def list(self) -> list[JobDetails]:
        """Return all submitted jobs, oldest first."""
        with self.translated_errors():
            submitted = [j for j in self.jobs.list_jobs() if j.submission_id]
        return sorted(submitted, key=lambda j: j.start_time or 0)

    def logs(self, submission_id: str) -> str:
        """Return everything a job has printed so far."""
        with self.translated_errors():
            return self.jobs.get_job_logs(submission_id)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Translate exceptions of Ray and requests into a RemoteError with a fix."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RemoteError(self._token_message()) from error
        except (ConnectionError, requests.RequestException) as error:
            raise UnreachableError(
                f"no Ray head answers at {self.address}. Use the dashboard's address (port 8265 by default), and check "
                "that the head is up and has ray[default] installed. From outside Kubernetes, run: "
                "kubectl port-forward service/NAME-head-svc 8265:8265"
            ) from error
        except RuntimeError as error:
            text = str(error)
            if "does not exist" in text:
                raise RemoteError(
                    f"{self.address} has no job of this id. List the ids: orchestrator jobs --address {self.address}"
                ) from error
            if "already exists" in text:
                raise RemoteError(
                    f"{self.address} already has a job of this name, and names are unique. Choose another --name, "
                    "or omit it."
                ) from error
            raise RemoteError(f"{self.address}: {last_error(text)}") from error

    def _token_message(self) -> str:
        if self.token:
            return (
                f"{self.address} refused the token from {self.token_from}. "
                "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, with the cluster's own token."
            )
        return (
            f"{self.address} requires a token and none was found. Set RAY_AUTH_TOKEN, set RAY_AUTH_TOKEN_PATH "
            "to a file with the token, or write it to ~/.ray/auth_token."
        )


def http_address(address: str) -> str:
    """Return the Jobs API's URL for an address, which may be `HOST:PORT`.

    Raises:
        RemoteError: It is no such address. Ray would take it for GCS's or another client's address, and retry
            for half a minute.
    """
    scheme, separator, rest = address.rpartition("://")
    rest = rest.rstrip("/")
    if scheme not in ("http", "https", "") or not rest or (not separator and ":" not in rest):
        raise RemoteError(
            f"--address {address!r} is not an address of the Jobs API → use the dashboard's, http://HOST:8265"
        )
    return f"{scheme or 'http'}://{rest}"


def last_error(text: str) -> str:
    """Return the last error in the head's answer if it holds tracebacks, else the whole answer."""
    errors = list(re.finditer(r"^[\w.]*(Error|Exception): ", text, re.MULTILINE))
    return text[errors[-1].start() :].rstrip(". \n") if errors else text


def find_token() -> tuple[str, str]:
    """Return the token and its source, searched in Ray's order; both are empty without a token.

    RAY_AUTH_MODE matters only if it is `disabled`: a cluster that needs no token ignores one.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "", ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).read_text(encoding="utf-8").strip(), f"RAY_AUTH_TOKEN_PATH={path}"
        except OSError as error:
            raise RemoteError(
                f"RAY_AUTH_TOKEN_PATH={path} cannot be read: {error.strerror}. Fix the path or unset the variable."
            ) from error
    default = Path.home() / ".ray" / "auth_token"
    if default.is_file():
        return default.read_text(encoding="utf-8").strip(), str(default)
    return "", ""


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    saved = {n: os.environ.pop(n) for n in names if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
