"""Rules about what a job brings to a cluster, and what it leaves there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import Problem
from orchestrator.redaction import SECRET_NAME
from orchestrator.spec.job import JobSpec


def in_job_package() -> bool:
    """Tell whether this process runs in a folder that Ray unpacked for a job and will delete after it."""
    return "working_dir_files" in Path.cwd().parts


def runtime_rules(spec: JobSpec) -> Iterator[Problem]:
    """Yield the problems of the `runtime` section."""
    runtime = spec.runtime
    for name in runtime.env_vars:
        if SECRET_NAME.search(name):
            yield Problem(
                f"runtime.env_vars.{name}",
                "looks like a secret, and the cluster shows these values to everyone who may list its jobs",
                "give it to the cluster's containers (from a Secret) and name it in runtime.secrets",
            )
    if "RAY_JOB_STOP_WAIT_TIME_S" in runtime.env_vars:
        yield Problem(
            "runtime.env_vars.RAY_JOB_STOP_WAIT_TIME_S",
            "has a field of its own",
            "runtime.stop_wait_s",
        )
    if runtime.pip_options and not runtime.pip:
        yield Problem("runtime.pip_options", "has no effect without runtime.pip", "drop it")


def kept_folders(spec: JobSpec) -> Iterator[Problem]:
    """A job's working directory is gone when the job is; runs and shards must lie elsewhere."""
    for field, value in (
        ("storage_path", spec.storage_path),
        ("data.prepared_dir", spec.data.prepared_dir),
    ):
        if not Path(value).is_absolute():
            yield Problem(
                field,
                "lies in the job's working directory, which Ray deletes when the job ends",
                f"an absolute path that every node sees: {field}=/shared/{Path(value).name}",
                value,
            )
