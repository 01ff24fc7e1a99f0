"""A job → the manifests that run it: a ConfigMap and a RayJob, or a RayCluster that takes jobs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from orchestrator.errors import Problem, SpecError
from orchestrator.kube.base import ObjectMeta
from orchestrator.kube.core import ConfigMap
from orchestrator.kube.kuberay import (
    AuthOptions,
    AutoscalerOptions,
    Credential,
    DeletionCondition,
    DeletionRule,
    DeletionStrategy,
    GcsFaultToleranceOptions,
    HeadGroupSpec,
    RayCluster,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    SubmitterConfig,
    WorkerGroupSpec,
)
from orchestrator.kube.merge import merged
from orchestrator.kube.pods import (
    JOB_FOLDER,
    S3_VARIABLES,
    container_security,
    driver_template,
    head_size,
    head_template,
    labels,
    submitter_template,
    worker_template,
)
from orchestrator.kube.sizing import PodSize, Size, size_of
from orchestrator.kube.text import MAX_RAYCLUSTER_NAME, MAX_RAYJOB_NAME, dump_documents, object_name
from orchestrator.kube.validate import problems_of
from orchestrator.spec import JobSpec, dump_spec
from orchestrator.spec.kubernetes import DeletionRules, KubernetesSpec, Shutdown

DRIVER = "driver"
"""The Ray resource of the node that only drivers run on; each takes one."""
MOST_DRIVERS = 100
SUBMITTER_RETRIES = 10
"""The operator's default of 2 fails healthy jobs whose head is slow to answer (KubeRay issues 2317, 4760)."""


def render(spec: JobSpec, cluster_only: bool = False) -> list[dict[str, Any]]:
    """Manifests as mappings, checked as `validate` checks files.

    Raises SpecError with everything that KubeRay or Kubernetes would refuse, PlanError where the workers
    do not fit `kubernetes.cluster`.
    """
    _require(spec, cluster_only)
    size = size_of(spec)
    documents = [_ray_cluster(spec, size)] if cluster_only else _ray_job(spec, size)
    if problems := [p for one in documents for p in problems_of(one)]:
        raise SpecError(problems, "manifests")
    return documents


def _require(spec: JobSpec, cluster_only: bool) -> None:
    k = spec.kubernetes
    needed = (
        ("cluster", k.cluster, "the workers' machines, as in 8xH100x4 or 16cpux2 (or --cluster)"),
        (
            "image",
            k.image,
            "an image built from cluster/Dockerfile, in a registry your cluster reads",
        ),
    )
    missing = [
        Problem(f"kubernetes.{name}", "is needed to render", fix)
        for name, value, fix in needed
        if not value
    ]
    missing += [
        Problem(
            f"kubernetes.secret_env.{name}",
            "is needed: runtime.secrets names it, and no container would have it",
            "{secret: NAME, key: KEY}",
        )
        for name in spec.runtime.secrets
        if name not in k.secret_env and not (name in S3_VARIABLES and k.s3 and k.s3.secret)
    ]
    if not cluster_only:
        missing += _own_reservations(spec)
    if missing:
        raise SpecError(missing)


def _own_reservations(spec: JobSpec) -> Iterator[Problem]:
    """A RayJob's driver has its place already: a reservation would send it where its job is not mounted, or
    wait for a node that there is none of."""
    sizes = "it gets kubernetes.head.cpus and kubernetes.head.memory_gib"
    for name in ("driver_cpus", "driver_memory_gib", "driver_resources"):
        if value := getattr(spec.runtime, name):
            yield Problem(f"runtime.{name}", "has no place in a RayJob", f"drop it: {sizes}", value)


def _ray_job(spec: JobSpec, size: Size) -> list[dict[str, Any]]:
    k = spec.kubernetes
    name = object_name(spec.name, MAX_RAYJOB_NAME)
    config = ConfigMap(metadata=_metadata(spec, f"{name}-job"), data={"job.yaml": dump_spec(spec)})
    optional: dict[str, Any] = {
        "active_deadline_seconds": k.active_deadline_s,
        "pre_running_deadline_seconds": k.pre_running_deadline_s,
        "backoff_limit": k.backoff_limit or None,
        "suspend": True if k.kueue else None,
        "entrypoint_resources": json.dumps({DRIVER: 1}) if k.gcs_fault_tolerance else None,
        **_cleanup(k),
    }
    if k.submission_mode == "K8sJobMode":
        optional["submitter_config"] = SubmitterConfig(backoff_limit=SUBMITTER_RETRIES)
        template = merged(submitter_template(spec).dump(), k.submitter.pod)
        optional["submitter_pod_template"] = template
    job = RayJobSpec(
        submission_mode=k.submission_mode,
        entrypoint=_entrypoint(spec),
        runtime_env_yaml=dump_documents([_runtime_env(spec)]),
        **{field: value for field, value in optional.items() if value is not None},
        ray_cluster_spec=_cluster_spec(spec, size, f"{name}-job"),
    )
    return [config.dump(), RayJob(metadata=_metadata(spec, name, queued=True), spec=job).dump()]


def _ray_cluster(spec: JobSpec, size: Size) -> dict[str, Any]:
    name = object_name(spec.name, MAX_RAYCLUSTER_NAME)
    cluster = RayCluster(
        metadata=_metadata(spec, name, queued=True), spec=_cluster_spec(spec, size, None)
    )
    return cluster.dump()


def _entrypoint(spec: JobSpec) -> str:
    """What a person would type. The job's relative paths start on the shared storage."""
    verb = "sweep" if spec.sweep is not None else "train"
    command = ("python", "-m", "orchestrator", verb, f"{JOB_FOLDER}/job.yaml")
    return shlex.join(("env", f"--chdir={spec.kubernetes.storage.mount_path}", *command))


def _runtime_env(spec: JobSpec) -> dict[str, Any]:
    """Time for a stopped job to commit, and packages; variables are the containers' already."""
    runtime = spec.runtime
    found: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(runtime.stop_wait_s)}}
    if runtime.pip:
        options = {"pip_install_options": list(runtime.pip_options)} if runtime.pip_options else {}
        found["pip"] = {"packages": list(runtime.pip), **options}
    return found


def _metadata(spec: JobSpec, name: str, queued: bool = False) -> ObjectMeta:
    k = spec.kubernetes
    marks = labels(spec)
    if queued and k.kueue:
        marks["kueue.x-k8s.io/queue-name"] = k.kueue.queue
        if k.kueue.priority_class:
            marks["kueue.x-k8s.io/priority-class"] = k.kueue.priority_class
    optional: dict[str, Any] = {"namespace": k.namespace, "annotations": queued and k.annotations}
    given = {field: value for field, value in optional.items() if value}
    return ObjectMeta(name=name, labels=marks, **given)


def _cleanup(k: KubernetesSpec) -> dict[str, Any]:
    match k.cleanup:
        case Shutdown(after_s=seconds):
            return {"shutdown_after_job_finishes": True, "ttl_seconds_after_finished": seconds}
        case DeletionRules(rules=rules):
            return {
                "deletion_strategy": DeletionStrategy(
                    deletion_rules=[
                        DeletionRule(
                            policy=rule.policy,
                            condition=DeletionCondition(
                                job_status=rule.on, ttl_seconds=rule.after_s
                            ),
                        )
                        for rule in rules
                    ]
                )
            }
        case _:
            return {}


def _cluster_spec(spec: JobSpec, size: Size, job: str | None) -> RayClusterSpec:
    k = spec.kubernetes
    head, on_head = head_size(spec), job if k.gcs_fault_tolerance is None else None
    optional: dict[str, Any] = {}
    if size.elastic:
        optional["enable_in_tree_autoscaling"] = True
        optional["autoscaler_options"] = AutoscalerOptions(
            version="v2",
            idle_timeout_seconds=k.idle_timeout_s,
            security_context=container_security().dump(),
        )
    if k.token_auth:
        optional["auth_options"] = AuthOptions(mode="token")
    if k.gcs_fault_tolerance:
        optional["gcs_fault_tolerance_options"] = _gcs(spec)
    return RayClusterSpec(
        ray_version=version("ray"),
        **optional,
        head_group_spec=HeadGroupSpec(
            # No CPUs on offer: Ray places no worker and no read task here.
            ray_start_params={"dashboard-host": "0.0.0.0", "num-cpus": "0", **_ray_memory(head)},
            template=merged(head_template(spec, head, on_head, size.elastic).dump(), k.head.pod),
        ),
        worker_group_specs=[
            WorkerGroupSpec(
                group_name="workers",
                replicas=size.max_pods,
                min_replicas=size.min_pods,
                max_replicas=size.max_pods,
                ray_start_params=_ray_memory(size.pod),
                template=merged(worker_template(spec, size).dump(), k.worker.pod),
            ),
            *_driver_group(spec, job),
        ],
    )


def _driver_group(spec: JobSpec, job: str | None) -> list[WorkerGroupSpec]:
    """One pod for the driver where the head may be lost: Ray would run it on the head, and it would go along.

    It offers no CPU either, so no worker lies on it, and DRIVER, so that the job's entrypoint does.
    """
    wanted, size = spec.kubernetes.gcs_fault_tolerance, head_size(spec)
    if wanted is None:
        return []
    # KubeRay writes the value into a shell's command line as it is.
    resources = '"' + json.dumps({DRIVER: MOST_DRIVERS}).replace('"', '\\"') + '"'
    return [
        WorkerGroupSpec(
            group_name="driver",
            replicas=1,
            min_replicas=1,
            max_replicas=1,
            ray_start_params={"num-cpus": "0", "resources": resources, **_ray_memory(size)},
            template=merged(driver_template(spec, size, job).dump(), wanted.driver_pod),
        )
    ]


def _ray_memory(size: PodSize) -> dict[str, str]:
    """Without these Ray counts /dev/shm twice: in its object store, and in the memory it offers."""
    return {"memory": str(size.ray_memory_bytes), "object-store-memory": str(size.store_bytes)}


def _gcs(spec: JobSpec) -> GcsFaultToleranceOptions:
    wanted = spec.kubernetes.gcs_fault_tolerance
    assert wanted is not None
    password = wanted.password
    if password is None:
        return GcsFaultToleranceOptions(redis_address=wanted.redis)
    reference = {"secretKeyRef": {"name": password.secret, "key": password.key}}
    return GcsFaultToleranceOptions(
        redis_address=wanted.redis, redis_password=Credential(value_from=reference)
    )
