"""Settings of a job on Kubernetes, through KubeRay. Nothing here changes what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from orchestrator.spec.runtime import VariableName
from orchestrator.values import Frozen, by_type

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
"""Of a Kubernetes object."""
Seconds = Annotated[int, Field(ge=0, lt=2**31)]
PositiveSeconds = Annotated[int, Field(ge=1, lt=2**31)]


class SecretKey(Frozen):
    """One entry of a Kubernetes Secret. Manifests name it; its value never enters them."""

    secret: Name
    """Name of the Secret, in the job's namespace."""
    key: Annotated[str, Field(min_length=1)]
    """Key inside it."""


class Toleration(Frozen):
    """Lets pods onto nodes with a matching taint."""

    key: str | None = None
    """Taint key; without one every key matches."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Equal` compares `value` too."""
    value: str | None = None
    """Taint value, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; without one every effect matches."""


class HeadPod(Frozen):
    """The head runs Ray's control plane, the driver, plan, export and report; it trains nothing."""

    cpus: Annotated[int, Field(ge=1)] = 4
    """CPU cores, requested and limited."""
    memory_gib: Annotated[float, Field(gt=0)] = 16
    """Memory. The export holds the whole model here once."""
    node_selector: dict[str, str] = {}
    """Labels that the node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that are tolerated."""
    pod: dict[str, Any] = {}
    """Merged into the pod template, so any field can be set: `{spec: {hostNetwork: true}}`. Lists of named
    things (containers, env, volumes) are merged by name; null removes. The Ray container is `ray-head`."""


class WorkerPod(Frozen):
    """Worker pods are as large as the plan needs them on `kubernetes.cluster`'s machines."""

    spot: bool = False
    """Only on machines that may be taken away (GKE, EKS, AKS and Karpenter labels are known)."""
    node_selector: dict[str, str] = {}
    """Labels that the node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that are tolerated, beside those of GPU and spot nodes."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes resource name of a GPU."""
    pod: dict[str, Any] = {}
    """Merged into the pod template, as in `head.pod`. The Ray container is `ray-worker`."""


class SubmitterPod(Frozen):
    """The pod that hands a RayJob to Ray in K8sJobMode."""

    pod: dict[str, Any] = {}
    """Merged into the pod template, as in `head.pod`. The container is `ray-job-submitter`."""


class StorageClaim(Frozen):
    """The shared folder that runs, prepared data and the model cache lie on."""

    claim: Name = "orchestrator"
    """PersistentVolumeClaim; ReadWriteMany where pods run on several nodes."""
    mount_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$")] = (
        "/mnt/orchestrator"
    )
    """Mount path in every pod. The job's relative paths start here."""


class S3Access(Frozen):
    """Lets pods read `s3://` data. Runs stay on `storage_path`: they need rename, which S3 has not."""

    secret: Name | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Default: the service account's rights."""
    endpoint_url: str | None = None
    """Of an S3-compatible store; default: AWS."""
    region: str | None = None
    """Region of the buckets."""


class GcsFaultTolerance(Frozen):
    """Ray's control state in Redis: training continues while a lost head is replaced. The driver gets a pod of
    its own, as large as the head and placed as it is, with the Ray resource `driver`: a job that is submitted
    to such a cluster runs there with `runtime.driver_resources: {driver: 1}`."""

    redis: str
    """`redis://host:port` or `rediss://host:port`, without a password."""
    password: SecretKey | None = None
    """Secret and key that hold the password."""
    driver_pod: dict[str, Any] = {}
    """Merged into the driver's pod, as in `head.pod`. Its Ray container is `ray-worker`."""


class Kueue(Frozen):
    """Queueing by Kueue: the job starts suspended and is admitted when its quota is free."""

    queue: Name
    """LocalQueue of the namespace."""
    priority_class: Name | None = None
    """Kueue's WorkloadPriorityClass."""


class Shutdown(Frozen):
    """The cluster goes some time after the job has ended."""

    type: Literal["shutdown"] = "shutdown"
    after_s: Seconds = 300
    """Seconds in which logs can still be read through Ray."""


class Keep(Frozen):
    """The cluster stays until it is deleted by hand."""

    type: Literal["keep"]


class DeletionRule(Frozen):
    """One of KubeRay's deletion rules."""

    on: Literal["SUCCEEDED", "FAILED"]
    """Final status of the job that triggers the rule."""
    policy: Literal["DeleteWorkers", "DeleteCluster", "DeleteSelf", "DeleteNone"]
    """Resources to delete: the worker pods, the whole cluster, the RayJob too, or nothing."""
    after_s: Seconds = 0
    """Seconds after the end."""


class DeletionRules(Frozen):
    """KubeRay's deletion rules, as they are."""

    type: Literal["rules"]
    rules: Annotated[tuple[DeletionRule, ...], Field(min_length=1)]
    """Each at most once per end and policy; workers go no later than the cluster, the cluster no later than the job."""


CleanupSpec = Annotated[
    Annotated[Shutdown, Tag("shutdown")]
    | Annotated[Keep, Tag("keep")]
    | Annotated[DeletionRules, Tag("rules")],
    by_type("shutdown"),
]


class KubernetesSpec(Frozen):
    """Used by `orchestrator render` only."""

    cluster: str | None = None
    """Machines for the workers, in the words of `plan --cluster`: 8xH100x4, 16cpux2. Needed to render."""
    image: Annotated[str, Field(pattern=r"^[\w][\w./:@-]*$")] | None = None
    """Container image with this package in it (`cluster/Dockerfile`). Needed to render."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """Kubernetes' pull policy of the image."""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets with registry credentials."""
    namespace: Name | None = None
    """Default: the namespace that `kubectl` is set to."""
    service_account: Name | None = None
    """For all pods. Default: the namespace's own; with an elastic worker range KubeRay makes one for the head."""
    priority_class: Name | None = None
    """PriorityClass of all pods."""
    labels: dict[str, str] = {}
    """Added to every object and pod."""
    annotations: dict[str, str] = {}
    """Added to the RayJob or RayCluster."""
    secret_env: dict[VariableName, SecretKey] = {}
    """Environment variables of all Ray containers whose values are taken from Secrets; those in
    `runtime.secrets` need an entry here. Values that are no secret stand in `runtime.env_vars`."""
    head: HeadPod = HeadPod()
    """The head pod."""
    worker: WorkerPod = WorkerPod()
    """The worker pods."""
    submitter: SubmitterPod = SubmitterPod()
    """The submitter's pod."""
    storage: StorageClaim = StorageClaim()
    """Shared storage."""
    s3: S3Access | None = None
    """Reading from S3."""
    node_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a worker machine's CPUs and memory left to Kubernetes and its daemons."""
    user_id: Annotated[int, Field(ge=1)] = 1000
    """User that containers run as, never root; 1000 is `ray` in Ray's images."""
    token_auth: bool = True
    """Ray's token authentication; the operator makes the token."""
    gcs_fault_tolerance: GcsFaultTolerance | None = None
    """Survive the loss of the head. Without it, and where the driver's own pod is lost, the run ends, and resumes when
    the job is submitted again: by `backoff_limit`, or by hand."""
    drain_s: PositiveSeconds = 30
    """Seconds between a pod's notice and its end; training commits a checkpoint in them, also where the whole cluster
    goes: deleted, suspended by Kueue, or over `active_deadline_s`. Spot machines give 120 s on AWS, 30 s or less
    on GKE and Azure."""
    idle_timeout_s: PositiveSeconds = 60
    """With an elastic worker range: idle seconds after which the autoscaler takes a pod away."""
    kueue: Kueue | None = None
    """Queueing."""
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    """Submitter of the job to Ray: a Kubernetes Job, the operator itself, or a container beside the head."""
    backoff_limit: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Times that KubeRay starts over with a new cluster; each resumes from the newest checkpoint."""
    active_deadline_s: PositiveSeconds | None = None
    """Most seconds for the whole RayJob, waiting included. `stop.max_time_s` commits first, this does not."""
    pre_running_deadline_s: PositiveSeconds | None = None
    """Most seconds until the job runs (KubeRay 1.7)."""
    cleanup: CleanupSpec = Shutdown()
    """Resources that KubeRay deletes after the job."""
