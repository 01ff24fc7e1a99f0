"""Secrets have no place in a job: it is copied into plans, reports, manifests and lists of jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Problem
from orchestrator.spec.job import JobSpec

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_ID)?$", re.I
)
CREDENTIALS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@'\"]*:([^/\s@'\"]+|(?!\d+/)[^\s@'\"]+)@"
)
"""A URL with a password in it, which may hold slashes; `host:8080/x@y` has none."""


def secret_rules(spec: JobSpec) -> Iterator[Problem]:
    """Texts, and variables of containers, anywhere in the job, that carry a secret. The value is not repeated."""
    yield from _secrets(spec.model_dump(mode="json"), "")


def _secrets(value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, dict):
        name = value.get("name")
        if path and isinstance(name, str) and SECRET_NAME.search(name) and value.get("value"):
            yield Problem(
                f"{path} ({name})",
                "looks like a secret, and would stand in manifests and plans",
                f"kubernetes.secret_env: {{{name}: {{secret: NAME, key: KEY}}}}",
            )
        for key, inner in value.items():
            yield from _secrets(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, f"{path}.{index}")
    elif isinstance(value, str) and CREDENTIALS.search(value):
        yield Problem(
            path,
            "holds a URL with a password, which would stand in plans, manifests and lists of jobs",
            "leave it to the environment: runtime.secrets, or on Kubernetes secret_env, s3.secret (keys of S3) "
            "or gcs_fault_tolerance.password",
        )
