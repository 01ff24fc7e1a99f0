"""Secrets have no place in a manifest: it lies in repositories, in etcd and on screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Problem
from orchestrator.spec.runtime_rules import SECRET_NAME

CREDENTIALS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@'\"]*:[^/\s@'\"]+@")
"""A URL with a password in it."""


def unsafe(documents: list[dict[str, Any]]) -> list[Problem]:
    """Environment variables and texts that carry a secret. The value is not repeated."""
    return [problem for one in documents for problem in _unsafe(one, str(one.get("kind", "")))]


def _unsafe(value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, dict):
        name = value.get("name")
        if isinstance(name, str) and SECRET_NAME.search(name) and value.get("value"):
            yield Problem(
                f"{path} ({name})",
                "looks like a secret, and would stand in the manifest",
                f"kubernetes.secret_env: {{{name}: {{secret: NAME, key: KEY}}}}",
            )
        for key, inner in value.items():
            yield from _unsafe(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unsafe(inner, f"{path}[{index}]")
    elif isinstance(value, str) and CREDENTIALS.search(value):
        yield Problem(
            path,
            "holds a URL with a password, which would stand in the manifest",
            "name a Secret: kubernetes.secret_env, or kubernetes.gcs_fault_tolerance.password",
        )
