"""Secrets have no place in a job: it is copied into plans, reports, manifests and lists of jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Problem, SpecError
from orchestrator.redaction import SECRET_KEY, SECRET_NAME, secret_in
from orchestrator.spec.job import JobSpec

ENVIRONMENT = (
    "leave it to the environment: runtime.secrets, or on Kubernetes secret_env, s3.secret (keys of S3) "
    "or gcs_fault_tolerance.password"
)
PIP = "name a variable that the nodes have: https://${INDEX_TOKEN}@HOST/simple"
PRESIGNED = (
    "copy the file to storage that the nodes may read (s3://BUCKET/PATH with keys from the environment, "
    "or a shared folder) and name it there"
)


def secret_rules(spec: JobSpec) -> Iterator[Problem]:
    """Yield texts and variables anywhere in the job that hold a secret. The value is not repeated."""
    yield from _secrets(spec.model_dump(mode="json"), "")


def refuse_secrets(value: Any, path: str) -> None:
    """Raise SpecError where texts given beside a job hold a secret."""
    if problems := list(_secrets(value, path)):
        raise SpecError(problems, path)


def _secrets(value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, dict):
        yield from _variable(value, path)
        for key, inner in value.items():
            at = f"{path}.{key}".lstrip(".")
            if isinstance(inner, str) and inner and SECRET_KEY.search(str(key)):
                if not path.startswith("runtime.env_vars"):  # has a rule of its own
                    why = "looks like a secret, and would appear in manifests and plans"
                    yield Problem(at, why, ENVIRONMENT)
            elif kind := secret_in(str(key)):
                yield _found(kind, path)
            else:
                yield from _secrets(inner, at)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, f"{path}.{index}")
    elif isinstance(value, str) and (kind := secret_in(value)):
        yield _found(kind, path)


def _variable(entry: dict[str, Any], path: str) -> Iterator[Problem]:
    """Yield a container's variable, `{name: …, value: …}`, whose name says that it is a secret."""
    name = entry.get("name")
    if path and isinstance(name, str) and SECRET_NAME.search(name) and entry.get("value"):
        yield Problem(
            f"{path} ({name})",
            "looks like a secret, and would appear in manifests and plans",
            f"kubernetes.secret_env: {{{name}: {{secret: NAME, key: KEY}}}}",
        )


def _found(kind: str, path: str) -> Problem:
    why = f"holds {kind.replace(' in it', '')}, which would appear in plans, manifests and lists of jobs"
    if path.startswith("runtime.pip"):
        return Problem(path, why, PIP)
    return Problem(path, why, PRESIGNED if kind == "a presigned URL" else ENVIRONMENT)
