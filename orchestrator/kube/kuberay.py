"""KubeRay's RayCluster, RayJob and RayCronJob, API version v1, field by field (KubeRay 1.7).

Written by hand from the API; a test compares names, types, enums and defaults with the operator's own
schemas. Pod templates stay plain mappings: Kubernetes' schema describes them, not KubeRay's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.kube.base import Manifest, Object

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Quantity = int | str
ManagedBy = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]
Policy = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]


class AuthOptions(Manifest):
    """Ray's token authentication. `mode: token` has to be written: an empty section enables nothing."""

    mode: Literal["disabled", "token"] | None = None
    secret_name: str | None = None
    enable_k8s_token_auth: bool | None = Field(None, alias="enableK8sTokenAuth")


class AutoscalerOptions(Manifest):
    """The autoscaler's container, and how it scales."""

    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: Int32 | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    resources: dict[str, Any] | None = None
    security_context: dict[str, Any] | None = None
    env: list[dict[str, Any]] | None = None
    env_from: list[dict[str, Any]] | None = None
    volume_mounts: list[dict[str, Any]] | None = None
    args: list[str] | None = None
    command: list[str] | None = None


class Credential(Manifest):
    """A value, or a reference to where it is kept."""

    value: str | None = None
    value_from: dict[str, Any] | None = None


class GcsStorage(Manifest):
    """A volume for GCS's state, under the rocksdb backend."""

    access_modes: list[str] | None = None
    claim_name: str | None = None
    deletion_policy: Literal["DeleteWithCluster", "Retain"] | None = None
    size: Quantity | None = None
    storage_class_name: str | None = None
    sub_path: str | None = None


class GcsFaultToleranceOptions(Manifest):
    """Where GCS keeps its state, so that a new head finds it."""

    backend: Literal["redis", "rocksdb"] | None = None
    external_storage_namespace: str | None = None
    redis_address: str | None = None
    redis_username: Credential | None = None
    redis_password: Credential | None = None
    storage: GcsStorage | None = None


class IngressTls(Manifest):
    """TLS of an ingress."""

    hosts: list[str] | None = None
    secret_name: str | None = None


class IngressOptions(Manifest):
    """The head's ingress."""

    host: str | None = None
    path: str | None = None
    path_type: Literal["Exact", "Prefix", "ImplementationSpecific"] | None = None
    tls: list[IngressTls] | None = None


class HeadGroupSpec(Manifest):
    """The head pod."""

    ray_start_params: dict[str, str] | None = None
    template: dict[str, Any]
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    service_type: str | None = None
    head_service: dict[str, Any] | None = None
    enable_ingress: bool | None = None
    ingress_options: IngressOptions | None = None


class ScaleStrategy(Manifest):
    """Which pods go first."""

    workers_to_delete: list[str] | None = None


class WorkerGroupSpec(Manifest):
    """A group of equal worker pods."""

    group_name: str
    replicas: Int32 = 0
    min_replicas: Int32 = 0
    max_replicas: Int32 = 2**31 - 1
    num_of_hosts: Int32 = 1
    priority: Int32 = 0
    idle_timeout_seconds: Int32 | None = None
    ray_start_params: dict[str, str] | None = None
    template: dict[str, Any]
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    scale_strategy: ScaleStrategy | None = None
    suspend: bool | None = None


class CollectorOptions(Manifest):
    """The container that collects events for the history server."""

    env: list[dict[str, Any]] | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    resources: dict[str, Any] | None = None


class HistoryServerOptions(Manifest):
    """KubeRay's history server."""

    collector_options: CollectorOptions | None = None


class NetworkRules(Manifest):
    """Traffic that is let through."""

    egress_rules: list[dict[str, Any]] | None = None
    ingress_rules: list[dict[str, Any]] | None = None


class GroupNetworkRules(NetworkRules):
    """Traffic that one worker group is allowed."""

    group_name: str


class NetworkPolicyOptions(Manifest):
    """Network policies that the operator makes."""

    mode: Literal["DenyAll", "DenyAllIngress", "DenyAllEgress"] = "DenyAll"
    head: NetworkRules | None = None
    worker: NetworkRules | None = None
    worker_groups: list[GroupNetworkRules] | None = None


class TlsOptions(Manifest):
    """TLS between Ray's processes."""

    enabled: bool | None = None


class UpgradeStrategy(Manifest):
    """What a changed spec does to a running cluster."""

    type: Literal["Recreate", "None"] | None = None


class RayClusterSpec(Manifest):
    """A Ray cluster."""

    ray_version: str | None = None
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    auth_options: AuthOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_service_annotations: dict[str, str] | None = None
    history_server_options: HistoryServerOptions | None = None
    managed_by: ManagedBy | None = None
    network_policy: NetworkPolicyOptions | None = None
    suspend: bool | None = None
    tls_options: TlsOptions | None = None
    upgrade_strategy: UpgradeStrategy | None = None
    head_group_spec: HeadGroupSpec
    worker_group_specs: list[WorkerGroupSpec] | None = None


class DeletionCondition(Manifest):
    """When a deletion rule applies: exactly one of the two states, and how long after it."""

    job_status: Literal["SUCCEEDED", "FAILED"] | None = None
    job_deployment_status: Literal["Failed"] | None = None
    ttl_seconds: Annotated[Int32, Field(ge=0)] = 0


class DeletionRule(Manifest):
    """What is deleted, and when."""

    condition: DeletionCondition
    policy: Policy


class LegacyDeletion(Manifest):
    """The older form of a deletion rule."""

    policy: Policy | None = None


class DeletionStrategy(Manifest):
    """Rules, or the older pair."""

    deletion_rules: Annotated[list[DeletionRule], Field(min_length=1)] | None = None
    on_success: LegacyDeletion | None = None
    on_failure: LegacyDeletion | None = None


class SubmitterConfig(Manifest):
    """The Kubernetes Job that submits."""

    backoff_limit: Int32 | None = None


class RayJobSpec(Manifest):
    """A Ray job and the cluster it runs on."""

    entrypoint: str | None = None
    submission_mode: str = "K8sJobMode"
    submitter_config: SubmitterConfig | None = None
    submitter_pod_template: dict[str, Any] | None = None
    shutdown_after_job_finishes: bool | None = None
    ttl_seconds_after_finished: Int32 = 0
    deletion_strategy: DeletionStrategy | None = None
    active_deadline_seconds: Int32 | None = None
    pre_running_deadline_seconds: Annotated[Int32, Field(ge=1)] | None = None
    backoff_limit: Int32 = 0
    suspend: bool | None = None
    managed_by: ManagedBy | None = None
    cluster_selector: dict[str, str] | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: str | None = None
    job_id: str | None = None
    metadata: dict[str, str] | None = None
    runtime_env_yaml: str | None = Field(None, alias="runtimeEnvYAML")
    ray_cluster_spec: RayClusterSpec | None = None


class _Object(Object):
    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    status: dict[str, Any] | None = None


class RayJob(_Object):
    """A job with a cluster of its own."""

    kind: Literal["RayJob"] = "RayJob"
    spec: RayJobSpec


class RayCluster(_Object):
    """A cluster that takes jobs."""

    kind: Literal["RayCluster"] = "RayCluster"
    spec: RayClusterSpec


class RayCronJobSpec(Manifest):
    """A job that starts at times."""

    schedule: str
    job_template: RayJobSpec
    suspend: bool | None = None
    time_zone: str | None = None


class RayCronJob(_Object):
    """A RayJob on a schedule."""

    kind: Literal["RayCronJob"] = "RayCronJob"
    spec: RayCronJobSpec
