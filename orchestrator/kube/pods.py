"""The head's and the workers' pods."""

from __future__ import annotations

import math

from orchestrator.kube.core import (
    Affinity,
    Capabilities,
    ClaimVolume,
    ConfigMapVolume,
    Container,
    ContainerSecurity,
    EmptyDir,
    EnvVar,
    Exec,
    Handler,
    KeyRef,
    Lifecycle,
    Match,
    NodeAffinity,
    NodeTerm,
    NodeTerms,
    ObjectMeta,
    Pod,
    PodSecurity,
    PodTemplate,
    PodToleration,
    Resources,
    Seccomp,
    SecretName,
    ValueFrom,
    Volume,
    VolumeMount,
)
from orchestrator.kube.sizing import MIB, PodSize, Size
from orchestrator.plan.cluster import GIB
from orchestrator.spec import JobSpec
from orchestrator.spec.kubernetes import HeadPod, Toleration, WorkerPod

JOB_FOLDER = "/etc/orchestrator"
"""Where the head finds job.yaml."""
RAY_IMAGE_GROUP = 100
"""Group of `ray` in Ray's images; files of the shared folder belong to it."""
LAST_WORDS_S = 5
"""Seconds a pod gets beyond `drain_s` to end."""
S3_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""How clouds mark machines they may take away. Some taint them with the same key and value."""


def head_template(spec: JobSpec, size: PodSize, with_job: str | None, elastic: bool) -> PodTemplate:
    """The head. `with_job` names the ConfigMap with the job, where its driver runs here."""
    pod = _pod_with_job(spec, "ray-head", size, with_job, "--head")
    if elastic:  # the autoscaler beside it talks to Kubernetes; nothing else does
        pod = pod.model_copy(update={"automount_service_account_token": None})
    return _template(spec, pod)


def driver_template(spec: JobSpec, size: PodSize, with_job: str | None) -> PodTemplate:
    """A Ray node for the driver alone, where the head may be lost. To KubeRay it is a worker."""
    return _template(spec, _pod_with_job(spec, "ray-worker", size, with_job, "--driver"))


def _pod_with_job(spec: JobSpec, name: str, size: PodSize, with_job: str | None, role: str) -> Pod:
    k = spec.kubernetes
    container = _container(spec, name, size, with_job is not None)
    volumes = _volumes(spec, size)
    if with_job:
        volumes.append(Volume(name="job", config_map=ConfigMapVolume(name=with_job)))
    pod = _pod(spec, k.head, container.model_copy(update=_last_act(spec, role)), volumes)
    more = {
        "automount_service_account_token": False,
        "termination_grace_period_seconds": k.drain_s + LAST_WORDS_S,
    }
    return pod.model_copy(update=more)


def _last_act(spec: JobSpec, *role: str) -> dict[str, Lifecycle]:
    """The container's preStop hook."""
    seconds = str(spec.kubernetes.drain_s)
    words = ["python", "-m", "orchestrator.kube.drain", "--deadline-s", seconds, *role]
    return {"lifecycle": Lifecycle(pre_stop=Handler(exec=Exec(command=words)))}


def worker_template(spec: JobSpec, size: Size) -> PodTemplate:
    """A worker pod, which drains its Ray node before it goes."""
    k = spec.kubernetes
    container = _container(spec, "ray-worker", size.pod, False)
    container = container.model_copy(update=_last_act(spec))
    tolerations = [*_tolerations(k.worker), *_usual_tolerations(k.worker, size.pod)]
    more = {
        "automount_service_account_token": False,
        "termination_grace_period_seconds": k.drain_s + LAST_WORDS_S,
        "tolerations": tolerations or None,
        "affinity": _on_spot() if k.worker.spot else None,
    }
    pod = _pod(spec, k.worker, container, _volumes(spec, size.pod))
    return _template(spec, pod.model_copy(update={n: v for n, v in more.items() if v is not None}))


def submitter_template(spec: JobSpec) -> PodTemplate:
    """The pod that hands the job to Ray: small, and under the same restrictions."""
    container = Container(
        name="ray-job-submitter",
        image=spec.kubernetes.image or "",
        image_pull_policy=spec.kubernetes.image_pull_policy,
        resources=_resources(PodSize(1, 1 * GIB), spec.kubernetes.worker),
        security_context=container_security(),
    )
    pod = _pod(spec, HeadPod(), container, [])
    more = {"restart_policy": "Never", "automount_service_account_token": False}
    return _template(spec, pod.model_copy(update=more))


def head_size(spec: JobSpec) -> PodSize:
    """The head as the job asks for it."""
    head = spec.kubernetes.head
    return PodSize(head.cpus, int(head.memory_gib * GIB) // MIB * MIB)


def literal(value: str) -> str:
    """A variable's value that arrives as it is: Kubernetes reads `$(NAME)` and `$$` as its own."""
    return value.replace("$", "$$")


def quantity(size_bytes: int) -> str:
    """Bytes as Kubernetes writes them, rounded up to a mebibyte."""
    return f"{math.ceil(size_bytes / MIB)}Mi"


def labels(spec: JobSpec) -> dict[str, str]:
    """On everything that belongs to this run."""
    ours = {"app.kubernetes.io/managed-by": "orchestrator", "orchestrator/run": spec.name}
    return {**ours, **spec.kubernetes.labels}


def _template(spec: JobSpec, pod: Pod) -> PodTemplate:
    return PodTemplate(metadata=ObjectMeta(labels=labels(spec)), spec=pod)


def _container(spec: JobSpec, name: str, size: PodSize, with_job: bool) -> Container:
    k = spec.kubernetes
    mounts = [
        VolumeMount(name="storage", mount_path=k.storage.mount_path),
        VolumeMount(name="shm", mount_path="/dev/shm"),
    ]
    if with_job:
        mounts.append(VolumeMount(name="job", mount_path=JOB_FOLDER, read_only=True))
    return Container(
        name=name,
        image=k.image or "",
        image_pull_policy=k.image_pull_policy,
        # Read tasks start where their raylet does, and the job's relative paths are theirs too.
        working_dir=k.storage.mount_path,
        env=_env(spec),
        resources=_resources(size, k.worker),
        volume_mounts=mounts,
        security_context=container_security(),
    )


def _env(spec: JobSpec) -> list[EnvVar]:
    """Values as written, secrets as references; the model cache is shared by all pods."""
    k = spec.kubernetes
    values = {"HF_HOME": f"{k.storage.mount_path}/huggingface", "PYTHONUNBUFFERED": "1"}
    secrets = {name: (ref.secret, ref.key) for name, ref in k.secret_env.items()}
    if k.s3:
        if k.s3.endpoint_url:
            values["AWS_ENDPOINT_URL"] = k.s3.endpoint_url
        if k.s3.region:
            values["AWS_DEFAULT_REGION"] = k.s3.region
        if k.s3.secret:
            for name in S3_VARIABLES:
                secrets.setdefault(name, (k.s3.secret, name))
    values |= spec.runtime.env_vars
    return [EnvVar(name=n, value=literal(v)) for n, v in values.items()] + [
        EnvVar(name=n, value_from=ValueFrom(secret_key_ref=KeyRef(name=secret, key=key)))
        for n, (secret, key) in secrets.items()
    ]


def _resources(size: PodSize, worker: WorkerPod) -> Resources:
    amounts = {"cpu": str(size.cpus), "memory": quantity(size.memory_bytes)}
    if size.gpus:
        amounts[worker.gpu_resource] = str(size.gpus)
    return Resources(requests=amounts, limits=amounts)


def _volumes(spec: JobSpec, size: PodSize) -> list[Volume]:
    claim = ClaimVolume(claim_name=spec.kubernetes.storage.claim)
    shm = EmptyDir(medium="Memory", size_limit=quantity(size.shm_bytes))
    return [
        Volume(name="storage", persistent_volume_claim=claim),
        Volume(name="shm", empty_dir=shm),
    ]


def _pod(
    spec: JobSpec, wishes: HeadPod | WorkerPod, container: Container, volumes: list[Volume]
) -> Pod:
    k = spec.kubernetes
    optional = {
        "volumes": volumes,
        "image_pull_secrets": [SecretName(name=name) for name in k.image_pull_secrets],
        "service_account_name": k.service_account,
        "priority_class_name": k.priority_class,
        "node_selector": wishes.node_selector,
        "tolerations": _tolerations(wishes),
    }
    security = PodSecurity(
        run_as_non_root=True,
        run_as_user=k.user_id,
        fs_group=RAY_IMAGE_GROUP,
        fs_group_change_policy="OnRootMismatch",
        seccomp_profile=Seccomp(type="RuntimeDefault"),
    )
    pod = Pod(containers=[container], security_context=security)
    return pod.model_copy(update={name: value for name, value in optional.items() if value})


def container_security() -> ContainerSecurity:
    """No way to more rights than the container starts with."""
    return ContainerSecurity(
        allow_privilege_escalation=False, capabilities=Capabilities(drop=["ALL"])
    )


def _tolerations(wishes: HeadPod | WorkerPod) -> list[PodToleration]:
    return [_toleration(one) for one in wishes.tolerations]


def _toleration(one: Toleration) -> PodToleration:
    return PodToleration(**one.model_dump(exclude_none=True))


def _usual_tolerations(worker: WorkerPod, size: PodSize) -> list[PodToleration]:
    """Of the taints that GPU and spot machines usually carry."""
    out = []
    if size.gpus:
        out.append(PodToleration(key=worker.gpu_resource, operator="Exists", effect="NoSchedule"))
    if worker.spot:
        out += [PodToleration(key=key, operator="Exists") for key in SPOT_LABELS]
    return out


def _on_spot() -> Affinity:
    """A machine with any cloud's spot label: terms are alternatives."""
    terms = [
        NodeTerm(match_expressions=[Match(key=key, operator="In", values=[value])])
        for key, value in SPOT_LABELS.items()
    ]
    required = NodeTerms(node_selector_terms=terms)
    return Affinity(
        node_affinity=NodeAffinity(required_during_scheduling_ignored_during_execution=required)
    )
