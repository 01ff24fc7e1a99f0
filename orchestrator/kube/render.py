"""Render a job as the manifests that run it: a ConfigMap and a RayJob, or a RayCluster that takes jobs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, Problem, SpecError
from orchestrator.kube.core import ConfigMap, ObjectMeta
from orchestrator.kube.kuberay import (
    QUEUE_LABEL,
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
    broken_rules,
    pod_templates,
)
from orchestrator.kube.merge import merged, pod_problems
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
from orchestrator.spec import JobSpec, dump_spec, load_spec
from orchestrator.spec.kubernetes import DeletionRules, KubernetesSpec, Shutdown

DRIVER = "driver"
"""The Ray resource of the node that only drivers run on; each driver takes one."""
MAX_DRIVERS = 100
SUBMITTER_RETRIES = 10
"""The operator's default of 2 fails healthy jobs with a slow head (KubeRay issues 2317, 4760)."""


def render_yaml(job: Path | None, overrides: Sequence[str], cluster_only: bool = False) -> str:
    """Return the YAML for `kubectl apply`, with the reasons for its sizes as comments.

    Local paths of the job belong to the cluster and are not looked up here.

    Raises:
        OrchestratorError: No job file is given.
        SpecError, PlanError: As `render` does.
    """
    if job is None:
        raise OrchestratorError("no job file is given → orchestrator render JOB.yaml")
    spec = load_spec(job, overrides, files="there")
    documents = render(spec, cluster_only)
    reasons = "".join(f"# {name}: {reason}\n" for name, reason in size_of(spec).reasons.items())
    return reasons + dump_documents(documents)


def render(spec: JobSpec, cluster_only: bool = False) -> list[dict[str, Any]]:
    """Return the manifests of a job as mappings.

    Args:
        spec: The job.
        cluster_only: Return a RayCluster that takes jobs, instead of the job's ConfigMap and RayJob.

    Raises:
        SpecError: With every setting that KubeRay, Kueue or Kubernetes would refuse.
        PlanError: The workers do not fit `kubernetes.cluster`.
    """
    _check_settings(spec, cluster_only)
    size = size_of(spec)
    config = [] if cluster_only else [_config_map(spec)]
    manifest = _ray_cluster(spec, size) if cluster_only else _ray_job(spec, size)
    problems = broken_rules(manifest)
    for path, template in pod_templates(manifest):
        problems += pod_problems(template, path)
    if problems:
        raise SpecError(problems, "manifests")
    return [*(one.dump() for one in config), manifest.dump()]


def _check_settings(spec: JobSpec, cluster_only: bool) -> None:
    """Raise SpecError with all settings that rendering lacks or cannot honor."""
    k = spec.kubernetes
    required = (
        ("cluster", k.cluster, "the workers' machines: --cluster 8xH100x4, or 16cpux2"),
        ("image", k.image, "an image built from cluster/Dockerfile, in a registry that the cluster reads"),
    )  # fmt: skip
    problems = [
        Problem(f"kubernetes.{name}", "is required by render", fix)
        for name, value, fix in required
        if not value
    ]
    problems += [
        Problem(
            f"kubernetes.secret_env.{name}",
            "is required, because runtime.secrets names this variable",
            "set it to {secret: NAME, key: KEY}",
        )
        for name in spec.runtime.secrets
        if name not in k.secret_env and not (name in S3_VARIABLES and k.s3 and k.s3.secret)
    ]
    if not cluster_only:
        problems += _driver_reservations(spec)
    if problems:
        raise SpecError(problems)


def _driver_reservations(spec: JobSpec) -> Iterator[Problem]:
    """Yield the reservations for a driver, which a RayJob cannot honor.

    They would place the driver on a node without the job's file, or make it wait for a node that never comes.
    """
    fix = "remove it: kubernetes.head.cpus and kubernetes.head.memory_gib size the driver's pod"
    for name in ("driver_cpus", "driver_memory_gib", "driver_resources"):
        if value := getattr(spec.runtime, name):
            yield Problem(f"runtime.{name}", "is not supported in a RayJob", fix, value)


def _job_name(spec: JobSpec) -> str:
    return object_name(spec.name, MAX_RAYJOB_NAME)


def _config_map(spec: JobSpec) -> ConfigMap:
    metadata = _metadata(spec, f"{_job_name(spec)}-job")
    return ConfigMap(metadata=metadata, data={"job.yaml": dump_spec(spec)})


def _ray_job(spec: JobSpec, size: Size) -> RayJob:
    k = spec.kubernetes
    name = _job_name(spec)
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
    return RayJob(metadata=_metadata(spec, name, queued=True), spec=job)


def _ray_cluster(spec: JobSpec, size: Size) -> RayCluster:
    name = object_name(spec.name, MAX_RAYCLUSTER_NAME)
    return RayCluster(
        metadata=_metadata(spec, name, queued=True), spec=_cluster_spec(spec, size, None)
    )


def _entrypoint(spec: JobSpec) -> str:
    """Return the command that a user would type. Relative paths of the job start on the shared storage."""
    verb = "sweep" if spec.sweep is not None else "train"
    command = ("python", "-m", "orchestrator", verb, f"{JOB_FOLDER}/job.yaml")
    return shlex.join(("env", f"--chdir={spec.kubernetes.storage.mount_path}", *command))


def _runtime_env(spec: JobSpec) -> dict[str, Any]:
    """Return the time that a stopped job gets to commit, and its packages.

    The containers have the job's variables already.
    """
    runtime = spec.runtime
    runtime_env: dict[str, Any] = {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(runtime.stop_wait_s)}
    }
    if runtime.pip:
        options = {"pip_install_options": list(runtime.pip_options)} if runtime.pip_options else {}
        runtime_env["pip"] = {"packages": list(runtime.pip), **options}
    return runtime_env


def _metadata(spec: JobSpec, name: str, queued: bool = False) -> ObjectMeta:
    k = spec.kubernetes
    object_labels = labels(spec)
    if queued and k.kueue:
        object_labels[QUEUE_LABEL] = k.kueue.queue
        if k.kueue.priority_class:
            object_labels["kueue.x-k8s.io/priority-class"] = k.kueue.priority_class
    optional: dict[str, Any] = {"namespace": k.namespace, "annotations": queued and k.annotations}
    given = {field: value for field, value in optional.items() if value}
    return ObjectMeta(name=name, labels=object_labels, **given)


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
            # Without CPUs, Ray places no worker and no read task on the head.
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
    """Return the group with a pod for the driver, where the head may be lost; else nothing.

    By default Ray runs the driver on the head, and it would be lost with it. The pod offers no CPU, so Ray
    places no worker on it, and the resource DRIVER, so Ray places the job's entrypoint on it.
    """
    settings, size = spec.kubernetes.gcs_fault_tolerance, head_size(spec)
    if settings is None:
        return []
    # KubeRay writes the value unquoted into a shell command.
    resources = '"' + json.dumps({DRIVER: MAX_DRIVERS}).replace('"', '\\"') + '"'
    return [
        WorkerGroupSpec(
            group_name="driver",
            replicas=1,
            min_replicas=1,
            max_replicas=1,
            ray_start_params={"num-cpus": "0", "resources": resources, **_ray_memory(size)},
            template=merged(driver_template(spec, size, job).dump(), settings.driver_pod),
        )
    ]


def _ray_memory(size: PodSize) -> dict[str, str]:
    """Return the memory settings of `ray start`.

    Without them Ray counts /dev/shm twice: in its object store and in the memory it offers.
    """
    return {"memory": str(size.ray_memory_bytes), "object-store-memory": str(size.store_bytes)}


def _gcs(spec: JobSpec) -> GcsFaultToleranceOptions:
    settings = spec.kubernetes.gcs_fault_tolerance
    assert settings is not None
    password = settings.password
    if password is None:
        return GcsFaultToleranceOptions(redis_address=settings.redis)
    reference = {"secretKeyRef": {"name": password.secret, "key": password.key}}
    return GcsFaultToleranceOptions(
        redis_address=settings.redis, redis_password=Credential(value_from=reference)
    )
