"""Build the request to the Jobs API, and check that the cluster can satisfy it."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestrator.data.prepare import find_prepared
from orchestrator.errors import OrchestratorError, PlanError, Problem, SpecError
from orchestrator.plan import Plan, make_plan
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.plan.resources import Workers, check_cpus, places, share_out
from orchestrator.plan.slots import slots_of
from orchestrator.spec import JobSpec
from orchestrator.values import Frozen

SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class JobRequest(Frozen):
    """One submission. `working_dir` is a zip file; `ray job submit` also takes a folder."""

    submission_id: str
    run: str
    entrypoint: str
    """A shell command. Every word from the user is quoted."""
    working_dir: str
    env_vars: dict[str, str]
    pip: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()
    driver_cpus: float = 0
    driver_memory_bytes: int = 0
    driver_resources: dict[str, float] = Field(default={})

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Return Ray's runtime environment."""
        runtime_env: dict[str, Any] = {
            "working_dir": self.working_dir,
            "env_vars": dict(self.env_vars),
        }
        if self.pip:
            runtime_env["pip"] = {"packages": list(self.pip)}
            if self.pip_options:
                runtime_env["pip"]["pip_install_options"] = list(self.pip_options)
        return runtime_env


def make_request(
    spec: JobSpec, job: Path, overrides: Sequence[str], working_dir: str, name: str | None = None
) -> JobRequest:
    """Return the request that trains a job or runs its sweep.

    Args:
        spec: The job.
        job: The job file, relative to the working directory.
        overrides: Overrides of the job's fields.
        working_dir: The packed working directory.
        name: The submission id. By default the run's name and six random digits, because ids are unique.

    Raises:
        OrchestratorError: The name cannot be part of a URL.
    """
    if name and not SUBMISSION_ID.fullmatch(name):
        raise OrchestratorError(
            f"--name {name!r} cannot be part of a URL. Use letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit."
        )
    runtime = spec.runtime
    verb = "train" if spec.sweep is None else "sweep"
    words = ["python", "-m", "orchestrator", verb, job.as_posix(), *overrides]
    return JobRequest(
        submission_id=name or f"{spec.name}-{secrets.token_hex(3)}",
        run=spec.name,
        entrypoint=shlex.join(words),
        working_dir=working_dir,
        # Ray's job supervisor runs in the job's environment, and reads this variable from it.
        env_vars={**runtime.env_vars, "RAY_JOB_STOP_WAIT_TIME_S": str(runtime.stop_wait_s)},
        pip=runtime.pip,
        pip_options=runtime.pip_options,
        driver_cpus=runtime.driver_cpus,
        driver_memory_bytes=int(runtime.driver_memory_gib * GIB),
        driver_resources=runtime.driver_resources,
    )


def job_in(root: Path, job: Path) -> Path:
    """Return the job file's path relative to `root`; raise SpecError if it is elsewhere."""
    try:
        return job.resolve().relative_to(root.resolve())
    except ValueError:
        problem = Problem(
            str(job),
            f"is outside the working directory {root}, which is uploaded",
            "submit from a folder above it",
        )
        raise SpecError([problem], str(job)) from None


def check_capacity(spec: JobSpec, cluster: Cluster) -> str:
    """Check that the cluster can ever satisfy the job's request, and return a description of the workers.

    Memory is not checked, because that needs rows and model (`plan_locally`).

    Raises:
        PlanError: The request exceeds the cluster.
    """
    slots = slots_of(spec, cluster) if spec.sweep is not None else None
    workers = slots.workers if slots else share_out(spec, cluster, {})
    all_workers = replace(workers, count=workers.count * (slots.count if slots else 1))
    check_cpus(all_workers, cluster)
    runtime = spec.runtime
    most_cpus = max(n.cpus for n in cluster.nodes)
    if runtime.driver_cpus > most_cpus:
        raise PlanError(
            f"runtime.driver_cpus = {runtime.driver_cpus:g}: the largest node has {most_cpus:g} CPUs. "
            "The job would wait forever. Lower it."
        )
    largest = max(n.memory_bytes for n in cluster.nodes)
    if runtime.driver_memory_gib * GIB > largest:
        raise PlanError(
            f"runtime.driver_memory_gib = {runtime.driver_memory_gib:g}: the largest node has {largest / GIB:.1f} GiB. "
            "The job would wait forever. Lower it."
        )
    if runtime.driver_cpus and not _fit_beside(all_workers, runtime.driver_cpus, cluster):
        raise PlanError(
            f"{all_workers.count} workers of {workers.cpus} CPUs and runtime.driver_cpus = {runtime.driver_cpus:g} "
            f"do not fit {cluster}. Lower runtime.driver_cpus or resources.cpus_per_worker."
        )
    each = f"{workers.gpus:g} GPU" if workers.on_gpu else f"{workers.cpus} CPU"
    groups = f"{slots.count} slot(s) of " if slots else ""
    return f"{groups}{workers.count} worker(s) of {each} on {cluster}"


def check_driver_resources(spec: JobSpec, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise PlanError if no node has the driver's custom resources, because the job would wait forever."""
    request = spec.runtime.driver_resources
    if request and not any(all(n.get(r, 0) >= request[r] for r in request) for n in nodes):
        requested = ", ".join(f"{name}: {amount:g}" for name, amount in request.items())
        built_in = {"CPU", "GPU", "memory", "object_store_memory"}
        custom = {name for n in nodes for name in n if name not in built_in and ":" not in name}
        raise PlanError(
            f"runtime.driver_resources = {{{requested}}}: no node has these, and the job would wait forever. "
            f"Custom resources of the cluster: {', '.join(sorted(custom)) or 'none'}."
        )


def plan_locally(spec: JobSpec, cluster: Cluster) -> Plan | None:
    """Return the whole plan with its memory, or None if this machine cannot read the prepared rows or the model.

    Without it the driver plans on the cluster.

    Raises:
        PlanError: The job cannot run on the cluster.
    """
    try:
        prepared = find_prepared(spec)
        return make_plan(spec, cluster, prepared) if prepared else None
    except PlanError:
        raise
    except (OrchestratorError, OSError):
        # The paths exist on the cluster only, or are damaged: the driver reports that.
        return None


def _fit_beside(workers: Workers, driver_cpus: float, cluster: Cluster) -> bool:
    """Return True if all workers fit beside the driver, on some node for the driver."""
    nodes = list(cluster.nodes)
    for index, node in enumerate(nodes):
        remaining = node.model_copy(update={"cpus": node.cpus - driver_cpus})
        others = [*nodes[:index], *nodes[index + 1 :]]
        if (
            remaining.cpus >= 0
            and places([remaining, *others], workers.gpus, workers.cpus) >= workers.count
        ):
            return True
    return False
