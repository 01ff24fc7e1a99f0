"""The parts of KubeRay's API (version v1, KubeRay 1.7) that `render` writes, with the rules on them.

A test compares names, types, enums and required fields with the operator's own schemas. Pod templates stay
plain mappings, because `kubernetes.*.pod` may set any field of a pod.

See docs/decisions/0130-render-checks-only-the-manifests-that-it-writes.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from orchestrator.errors import Problem
from orchestrator.kube.core import Manifest, Object

FT_ANNOTATION = "ray.io/ft-enabled"
STORAGE_ANNOTATION = "ray.io/external-storage-namespace"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


class AuthOptions(Manifest):
    """Ray's token authentication. `mode: token` must be written: an empty section enables nothing."""

    mode: Literal["token"]


class AutoscalerOptions(Manifest):
    """The autoscaler's container and its settings."""

    version: Literal["v2"]
    idle_timeout_seconds: int
    security_context: dict[str, Any]


class Credential(Manifest):
    """A reference to a credential."""

    value_from: dict[str, Any]


class GcsFaultToleranceOptions(Manifest):
    """The Redis that keeps GCS's state, so that a new head can read it."""

    redis_address: str
    redis_password: Credential | None = None


class HeadGroupSpec(Manifest):
    """The head pod."""

    ray_start_params: dict[str, str]
    template: dict[str, Any]


class WorkerGroupSpec(Manifest):
    """A group of equal worker pods."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: dict[str, Any]


class RayClusterSpec(Manifest):
    """A Ray cluster."""

    ray_version: str
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    auth_options: AuthOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_group_spec: HeadGroupSpec
    worker_group_specs: list[WorkerGroupSpec]


class DeletionCondition(Manifest):
    """The end of a job after which a deletion rule applies, and the seconds after it."""

    job_status: Literal["SUCCEEDED", "FAILED"]
    ttl_seconds: int


class DeletionRule(Manifest):
    """One deletion and its condition."""

    condition: DeletionCondition
    policy: Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]


class DeletionStrategy(Manifest):
    """Deletion rules."""

    deletion_rules: list[DeletionRule]


class SubmitterConfig(Manifest):
    """The Kubernetes Job that submits."""

    backoff_limit: int


class RayJobSpec(Manifest):
    """A Ray job and the cluster it runs on."""

    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    submitter_config: SubmitterConfig | None = None
    submitter_pod_template: dict[str, Any] | None = None
    shutdown_after_job_finishes: bool | None = None
    ttl_seconds_after_finished: int | None = None
    deletion_strategy: DeletionStrategy | None = None
    active_deadline_seconds: int | None = None
    pre_running_deadline_seconds: int | None = None
    backoff_limit: int | None = None
    suspend: bool | None = None
    entrypoint_resources: str | None = None
    runtime_env_yaml: str = Field(alias="runtimeEnvYAML")
    ray_cluster_spec: RayClusterSpec


class RayJob(Object):
    """A job with a cluster of its own."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    spec: RayJobSpec


class RayCluster(Object):
    """A cluster that takes jobs."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayCluster"] = "RayCluster"
    spec: RayClusterSpec


def broken_rules(manifest: RayJob | RayCluster) -> list[Problem]:
    """Return every rule of the operator or of Kueue that a job's settings break and no schema holds.

    References: `ray-operator/controllers/ray/utils/validation.go` in KubeRay 1.7 and
    `pkg/controller/jobs/rayjob/rayjob_webhook.go` in Kueue. Rules on fields that `render` never writes, or
    writes in one valid form only, are left to the cluster (`kubectl apply --dry-run=server`).
    """
    annotations = manifest.metadata.annotations
    if isinstance(manifest, RayJob):
        cluster, path = manifest.spec.ray_cluster_spec, "spec.rayClusterSpec"
        found = [*_deletion(manifest.spec), *_sidecar(manifest.spec)]
    else:
        cluster, path, found = manifest.spec, "spec", []
    found += [*_redis(cluster, annotations, path), *_autoscaler(cluster, path)]
    if QUEUE_LABEL in manifest.metadata.labels:
        found += _kueue(manifest, cluster, path)
    return found


def pod_templates(manifest: RayJob | RayCluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the template of every pod in a manifest."""
    cluster, path = manifest.spec, "spec"
    if isinstance(cluster, RayJobSpec):
        if cluster.submitter_pod_template is not None:
            yield "spec.submitterPodTemplate", cluster.submitter_pod_template
        cluster, path = cluster.ray_cluster_spec, "spec.rayClusterSpec"
    yield f"{path}.headGroupSpec.template", cluster.head_group_spec.template
    for index, group in enumerate(cluster.worker_group_specs):
        yield f"{path}.workerGroupSpecs[{index}].template", group.template


def _deletion(spec: RayJobSpec) -> Iterator[Problem]:
    path = "spec.deletionStrategy.deletionRules"
    rules = spec.deletion_strategy.deletion_rules if spec.deletion_strategy else []
    seconds: dict[str, dict[str, int]] = defaultdict(dict)
    for index, rule in enumerate(rules):
        state, policy = rule.condition.job_status, rule.policy
        field = f"{path}[{index}].policy"
        if policy == "DeleteWorkers" and spec.ray_cluster_spec.enable_in_tree_autoscaling:
            why = "cannot be combined with the autoscaler of an elastic worker range"
            yield Problem(field, why, "use DeleteCluster in kubernetes.cleanup.rules", policy)
        if policy in seconds[state]:
            fix = "remove one entry of kubernetes.cleanup.rules"
            yield Problem(field, f"duplicate rule for {state}", fix, policy)
        seconds[state][policy] = rule.condition.ttl_seconds
    for end, delays in seconds.items():
        for first, then in pairwise(policy for policy in DELETION_ORDER if policy in delays):
            if delays[then] < delays[first]:
                why = (
                    f"{end}: {then} after {delays[then]} s must not precede "
                    f"{first} after {delays[first]} s"
                )
                yield Problem(path, why, f"set after_s of {then} to {delays[first]} or more")


def _sidecar(spec: RayJobSpec) -> Iterator[Problem]:
    if spec.submission_mode == "SidecarMode":
        template = spec.ray_cluster_spec.head_group_spec.template
        yield from _restart_policy(template, "spec.rayClusterSpec.headGroupSpec", "SidecarMode")


def _redis(spec: RayClusterSpec, annotations: dict[str, str], path: str) -> Iterator[Problem]:
    """Yield settings of Redis outside `gcsFaultToleranceOptions`, the only place that the operator accepts."""
    variables = _variables(spec.head_group_spec.template)
    fix = "set kubernetes.gcs_fault_tolerance instead"
    by_hand = ["REDIS_USERNAME"]
    if spec.gcs_fault_tolerance_options is not None:
        by_hand += ["REDIS_PASSWORD", "RAY_REDIS_ADDRESS"]
        for name in (FT_ANNOTATION, STORAGE_ANNOTATION):
            if annotations.get(name):
                why = "conflicts with gcsFaultToleranceOptions"
                remove = "remove it from kubernetes.annotations"
                yield Problem(f"metadata.annotations.{name}", why, remove)
    elif annotations.get(FT_ANNOTATION, "").lower() != "true":
        by_hand.append("RAY_REDIS_ADDRESS")
    for name in by_hand:
        if name in variables:
            field = f"{path}.headGroupSpec.template.spec.containers[0].env.{name}"
            yield Problem(field, "must not be set as an environment variable", fix)


def _autoscaler(spec: RayClusterSpec, path: str) -> Iterator[Problem]:
    name = "RAY_enable_autoscaler_v2"
    switch = _variables(spec.head_group_spec.template).get(name)
    if switch is not None and (spec.enable_in_tree_autoscaling or switch in ("1", "true")):
        field = f"{path}.headGroupSpec.template.spec.containers[0].env.{name}"
        why = (
            "conflicts with autoscalerOptions.version"
            if spec.enable_in_tree_autoscaling
            else "needs the autoscaler, and the number of workers is fixed"
        )
        yield Problem(field, why, "remove the variable", switch)
    if spec.enable_in_tree_autoscaling:
        groups = [("headGroupSpec", spec.head_group_spec.template)]
        for index, group in enumerate(spec.worker_group_specs):
            groups.append((f"workerGroupSpecs[{index}]", group.template))
        for group_path, template in groups:
            yield from _restart_policy(template, f"{path}.{group_path}", "autoscaler v2")


def _restart_policy(template: dict[str, Any], path: str, reason: str) -> Iterator[Problem]:
    policy = _pod(template).get("restartPolicy")
    if policy not in (None, "", "Never"):
        field = f"{path}.template.spec.restartPolicy"
        yield Problem(field, f"must be Never or unset with {reason}", "set it to Never", policy)


def _kueue(manifest: RayJob | RayCluster, cluster: RayClusterSpec, path: str) -> Iterator[Problem]:
    if isinstance(manifest, RayJob) and not manifest.spec.shutdown_after_job_finishes:
        yield Problem(
            "spec.shutdownAfterJobFinishes",
            "must be true for Kueue, so that a finished job returns its quota",
            "set kubernetes.cleanup.type=shutdown",
        )
    elastic = manifest.metadata.annotations.get(ELASTIC_ANNOTATION) == "true"
    if cluster.enable_in_tree_autoscaling and not elastic:
        yield Problem(
            f"{path}.enableInTreeAutoscaling",
            "needs Kueue's feature gate ElasticJobsViaWorkloadSlices and an annotation",
            f'set {ELASTIC_ANNOTATION}: "true" in kubernetes.annotations, '
            "or a fixed resources.num_workers",
            True,
        )


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    """Return a template's pod. Malformed parts count as absent: Kubernetes' schema names them."""
    spec = template.get("spec")
    return spec if isinstance(spec, dict) else {}


def _variables(template: dict[str, Any]) -> dict[str, Any]:
    """Return the environment of the Ray container, which is the first one."""
    first = (_mappings(_pod(template).get("containers")) or [{}])[0]
    return {str(one.get("name")): one.get("value", "") for one in _mappings(first.get("env"))}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
