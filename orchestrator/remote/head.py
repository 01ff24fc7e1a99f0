"""The head of a Ray cluster, over HTTP: its jobs, its nodes, and its refusals in plain words."""

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
"""Ray's clients let these win over the address they are given."""


class RemoteError(OrchestratorError):
    """The cluster cannot be reached, refuses us, or does not know the job."""


class UnreachableError(RemoteError):
    """Nobody answers: the address is wrong, or the head is down or restarting."""


class Head:
    """A connection to one head's Jobs API. Raises RemoteError when it is made and when it is used."""

    def __init__(self, address: str) -> None:
        self.address = http_address(address)
        self.token, self.token_from = find_token()
        self.headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with self.in_words(), _without(RAY_OVERRIDES):
            from ray.job_submission import JobSubmissionClient

            for module in ("job.sdk", "dashboard_sdk"):  # they set INFO when they are imported
                logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
            self.jobs: JobSubmissionClient = JobSubmissionClient(
                self.address, headers=dict(self.headers)
            )

    def cluster(self) -> Cluster:
        """What its living nodes have, as a plan counts it."""
        return ray_cluster(f"Ray cluster at {self.address}", self.resources())

    def resources(self) -> builtins.list[dict[str, float]]:
        """What each living node has, by Ray's names."""
        from ray.util.state.api import StateApiClient
        from ray.util.state.common import ListApiOptions, StateResource

        with self.in_words(), _without(RAY_OVERRIDES):
            client = StateApiClient(self.address, headers=dict(self.headers))
            nodes: builtins.list[Any] = client.list(
                StateResource.NODES, ListApiOptions(limit=10_000), raise_on_missing_output=False
            )
        return [n["resources_total"] for n in nodes if n["state"] == "ALIVE"]

    def submit(self, request: JobRequest) -> str:
        """Upload the package and submit; returns the submission's id."""
        with self.in_words():
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
        """How a job stands."""
        with self.in_words():
            return self.jobs.get_job_info(submission_id)

    def list(self) -> list[JobDetails]:
        """All submitted jobs, oldest first."""
        with self.in_words():
            found = [j for j in self.jobs.list_jobs() if j.submission_id]
        return sorted(found, key=lambda j: j.start_time or 0)

    def logs(self, submission_id: str) -> str:
        """Everything a job has printed so far."""
        with self.in_words():
            return self.jobs.get_job_logs(submission_id)

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Ray's and requests' exceptions as a RemoteError that says what to do."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RemoteError(self._refused()) from error
        except (ConnectionError, requests.RequestException) as error:
            raise UnreachableError(
                f"no Ray head answers at {self.address}. Is it the dashboard's address (port 8265 by default), "
                "is it up, and is ray[default] installed there? From outside Kubernetes: "
                "kubectl port-forward service/NAME-head-svc 8265:8265"
            ) from error
        except RuntimeError as error:
            text = str(error)
            if "does not exist" in text:
                raise RemoteError(
                    f"{self.address} knows no such job. `orchestrator jobs --address {self.address}` lists them."
                ) from error
            if "already exists" in text:
                raise RemoteError(
                    f"{self.address} knows a job of that name already, and takes each name once. Choose another "
                    "--name, or leave it out."
                ) from error
            raise RemoteError(f"{self.address}: {last_words(text)}") from error

    def _refused(self) -> str:
        if self.token:
            return (
                f"{self.address} refused the token from {self.token_from}. "
                "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, with the cluster's own token."
            )
        return (
            f"{self.address} asks for a token and none was found. Set RAY_AUTH_TOKEN, set RAY_AUTH_TOKEN_PATH "
            "to a file that holds it, or write it to ~/.ray/auth_token."
        )


def http_address(address: str) -> str:
    """`HOST:PORT` as the Jobs API's URL. Raises RemoteError for what is none: Ray would take it for GCS's address,
    or for another client's, and try for half a minute."""
    scheme, found, rest = address.rpartition("://")
    rest = rest.rstrip("/")
    if scheme not in ("http", "https", "") or not rest or (not found and ":" not in rest):
        raise RemoteError(
            f"--address {address!r} is not the Jobs API's: it is http://HOST:8265, the dashboard's address and port"
        )
    return f"{scheme or 'http'}://{rest}"


def last_words(text: str) -> str:
    """What the head's answer says in the end, where it is a traceback of traceback; else all of it."""
    errors = list(re.finditer(r"^[\w.]*(Error|Exception): ", text, re.MULTILINE))
    return text[errors[-1].start() :].rstrip(". \n") if errors else text


def find_token() -> tuple[str, str]:
    """(token, where it was found), by Ray's own order; both empty where there is none.

    RAY_AUTH_MODE is not asked, unless it is `disabled`: a cluster that wants no token ignores one.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "", ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(named).read_text(encoding="utf-8").strip(), f"RAY_AUTH_TOKEN_PATH={named}"
        except OSError as error:
            raise RemoteError(
                f"RAY_AUTH_TOKEN_PATH={named} cannot be read: {error.strerror}. Mend it or unset it."
            ) from error
    usual = Path.home() / ".ray" / "auth_token"
    if usual.is_file():
        return usual.read_text(encoding="utf-8").strip(), str(usual)
    return "", ""


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {n: os.environ.pop(n) for n in names if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
