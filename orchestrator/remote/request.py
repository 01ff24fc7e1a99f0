"""What is asked of the Jobs API, as a value: it can be printed, tested, and typed by hand."""

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
    """One submission. `working_dir` is a folder for a person's `ray job submit`, a zip file here."""

    submission_id: str
    run: str
    entrypoint: str
    """A shell command; every word that came from outside is quoted."""
    working_dir: str
    env_vars: dict[str, str]
    pip: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()
    driver_cpus: float = 0
    driver_memory_bytes: int = 0
    driver_resources: dict[str, float] = Field(default={})

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment."""
        found: dict[str, Any] = {"working_dir": self.working_dir, "env_vars": dict(self.env_vars)}
        if self.pip:
            found["pip"] = {"packages": list(self.pip)}
            if self.pip_options:
                found["pip"]["pip_install_options"] = list(self.pip_options)
        return found


def make_request(
    spec: JobSpec, job: Path, overrides: Sequence[str], working_dir: str, name: str | None = None
) -> JobRequest:
    """The request that trains `job`, or runs its sweep; a path relative to the working directory.

    `name`: the submission's id; by default the run's name and six random digits, as the Jobs API
    takes each id once. Raises OrchestratorError for a name that is no part of a URL.
    """
    if name and not SUBMISSION_ID.fullmatch(name):
        raise OrchestratorError(
            f"--name {name!r}: the Jobs API's URLs hold it. Use letters, digits, '.', '_' and '-', "
            "and begin with one of the first two."
        )
    runtime = spec.runtime
    verb = "train" if spec.sweep is None else "sweep"
    words = ["python", "-m", "orchestrator", verb, job.as_posix(), *overrides]
    return JobRequest(
        submission_id=name or f"{spec.name}-{secrets.token_hex(3)}",
        run=spec.name,
        entrypoint=shlex.join(words),
        working_dir=working_dir,
        # The job's supervisor reads this one from its own environment, which is the job's.
        env_vars={**runtime.env_vars, "RAY_JOB_STOP_WAIT_TIME_S": str(runtime.stop_wait_s)},
        pip=runtime.pip,
        pip_options=runtime.pip_options,
        driver_cpus=runtime.driver_cpus,
        driver_memory_bytes=int(runtime.driver_memory_gib * GIB),
        driver_resources=runtime.driver_resources,
    )


def job_in(root: Path, job: Path) -> Path:
    """The job file's path relative to `root`; raises SpecError where it lies elsewhere."""
    try:
        return job.resolve().relative_to(root.resolve())
    except ValueError:
        problem = Problem(
            str(job),
            f"lies outside the working directory {root}, which is what the cluster gets",
            "submit from a folder above it",
        )
        raise SpecError([problem], str(job)) from None


def must_fit(spec: JobSpec, cluster: Cluster) -> str:
    """Whether the cluster can ever give what the job asks; returns the workers in words.

    Raises PlanError. Memory is not looked at: that takes rows and model (`plan_from_here`).
    """
    slots = slots_of(spec, cluster) if spec.sweep is not None else None
    workers = slots.workers if slots else share_out(spec, cluster, {})
    everyone = replace(workers, count=workers.count * (slots.count if slots else 1))
    check_cpus(everyone, cluster)
    runtime = spec.runtime
    if runtime.driver_cpus > max(n.cpus for n in cluster.nodes):
        raise PlanError(
            f"runtime.driver_cpus = {runtime.driver_cpus:g}: no node has so many; {cluster}. "
            "The job would wait for ever. Lower it."
        )
    largest = max(n.memory_bytes for n in cluster.nodes)
    if runtime.driver_memory_gib * GIB > largest:
        raise PlanError(
            f"runtime.driver_memory_gib = {runtime.driver_memory_gib:g}: the largest node has {largest / GIB:.1f} GiB. "
            "The job would wait for ever. Lower it."
        )
    if runtime.driver_cpus and not _fit_beside(everyone, runtime.driver_cpus, cluster):
        raise PlanError(
            f"{everyone.count} workers of {workers.cpus} CPUs and runtime.driver_cpus = {runtime.driver_cpus:g} "
            f"do not fit {cluster}. Lower runtime.driver_cpus or resources.cpus_per_worker."
        )
    each = f"{workers.gpus:g} GPU" if workers.on_gpu else f"{workers.cpus} CPU"
    groups = f"{slots.count} slot(s) of " if slots else ""
    return f"{groups}{workers.count} worker(s) of {each} on {cluster}"


def must_offer(spec: JobSpec, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises PlanError where no node has the resources that the driver asks for: it would wait for ever."""
    wanted = spec.runtime.driver_resources
    if wanted and not any(all(n.get(r, 0) >= wanted[r] for r in wanted) for n in nodes):
        asked = ", ".join(f"{name}: {amount:g}" for name, amount in wanted.items())
        usual = {"CPU", "GPU", "memory", "object_store_memory"}
        theirs = {name for n in nodes for name in n if name not in usual and ":" not in name}
        raise PlanError(
            f"runtime.driver_resources = {{{asked}}}: no node has that, and the job would wait for ever. "
            f"The cluster's own resources: {', '.join(sorted(theirs)) or 'none'}."
        )


def plan_from_here(spec: JobSpec, cluster: Cluster) -> Plan | None:
    """The whole plan, memory and all, where prepared rows and model lie on paths that this machine sees too.

    None where they do not: the driver makes the plan on the cluster then. Raises PlanError.
    """
    try:
        prepared = find_prepared(spec)
        return make_plan(spec, cluster, prepared) if prepared else None
    except PlanError:
        raise
    except (OrchestratorError, OSError):
        # They are the cluster's own, or so broken that the driver will say it.
        return None


def _fit_beside(workers: Workers, driver_cpus: float, cluster: Cluster) -> bool:
    """Whether the workers find a place with the driver on the best node for that."""
    nodes = list(cluster.nodes)
    for index, node in enumerate(nodes):
        left = node.model_copy(update={"cpus": node.cpus - driver_cpus})
        others = [*nodes[:index], *nodes[index + 1 :]]
        if left.cpus >= 0 and places([left, *others], workers.gpus, workers.cpus) >= workers.count:
            return True
    return False
