"""Build the pods of the head, the workers, the driver and the submitter."""

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
"""The folder of job.yaml in the pod with the driver."""
RAY_IMAGE_GROUP = 100
"""The group of the user `ray` in Ray's images. It owns the files of the shared folder."""
GRACE_MARGIN_S = 5
"""Seconds beyond `drain_s` that a pod gets to end."""
S3_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""Node labels of spot machines, by cloud. Some clouds taint the machines with the same key and value."""


def head_template(spec: JobSpec, size: PodSize, with_job: str | None, elastic: bool) -> PodTemplate:
    """Return the head's template. `with_job` is the job's ConfigMap, if the driver runs on the head."""
    pod = _pod_with_job(spec, "ray-head", size, with_job, "--head")
    if elastic:  # only the autoscaler's container calls the Kubernetes API
        pod = pod.model_copy(update={"automount_service_account_token": None})
    return _template(spec, pod)


def driver_template(spec: JobSpec, size: PodSize, with_job: str | None) -> PodTemplate:
    """Return the template of a Ray node for the driver alone. KubeRay treats it as a worker."""
    return _template(spec, _pod_with_job(spec, "ray-worker", size, with_job, "--driver"))


def _pod_with_job(spec: JobSpec, name: str, size: PodSize, with_job: str | None, role: str) -> Pod:
    k = spec.kubernetes
    container = _container(spec, name, size, with_job is not None)
    volumes = _volumes(spec, size)
    if with_job:
        volumes.append(Volume(name="job", config_map=ConfigMapVolume(name=with_job)))
    pod = _pod(spec, k.head, container.model_copy(update=_drain_hook(spec, role)), volumes)
    fields = {
        "automount_service_account_token": False,
        "termination_grace_period_seconds": k.drain_s + GRACE_MARGIN_S,
    }
    return pod.model_copy(update=fields)


def _drain_hook(spec: JobSpec, *role: str) -> dict[str, Lifecycle]:
    """Return the field of a container with its preStop hook."""
    seconds = str(spec.kubernetes.drain_s)
    command = ["python", "-m", "orchestrator.kube.drain", "--deadline-s", seconds, *role]
    return {"lifecycle": Lifecycle(pre_stop=Handler(exec=Exec(command=command)))}


def worker_template(spec: JobSpec, size: Size) -> PodTemplate:
    """Return the template of a worker pod, which drains its Ray node before it ends."""
    k = spec.kubernetes
    container = _container(spec, "ray-worker", size.pod, False)
    container = container.model_copy(update=_drain_hook(spec))
    tolerations = [*_tolerations(k.worker), *_default_tolerations(k.worker, size.pod)]
    fields = {
        "automount_service_account_token": False,
        "termination_grace_period_seconds": k.drain_s + GRACE_MARGIN_S,
        "tolerations": tolerations or None,
        "affinity": _on_spot() if k.worker.spot else None,
    }
    pod = _pod(spec, k.worker, container, _volumes(spec, size.pod))
    return _template(
        spec, pod.model_copy(update={n: v for n, v in fields.items() if v is not None})
    )


def submitter_template(spec: JobSpec) -> PodTemplate:
    """Return the template of the pod that submits the job: small, with the same restrictions."""
    container = Container(
        name="ray-job-submitter",
        image=spec.kubernetes.image or "",
        image_pull_policy=spec.kubernetes.image_pull_policy,
        resources=_resources(PodSize(1, 1 * GIB), spec.kubernetes.worker),
        security_context=container_security(),
    )
    pod = _pod(spec, HeadPod(), container, [])
    fields = {"restart_policy": "Never", "automount_service_account_token": False}
    return _template(spec, pod.model_copy(update=fields))


def head_size(spec: JobSpec) -> PodSize:
    """Return the size of the head that the job requests."""
    head = spec.kubernetes.head
    return PodSize(head.cpus, int(head.memory_gib * GIB) // MIB * MIB)


def literal(value: str) -> str:
    """Return a variable's value with `$` escaped, because Kubernetes expands `$(NAME)` and `$$`."""
    return value.replace("$", "$$")


def quantity(size_bytes: int) -> str:
    """Return bytes as a Kubernetes quantity, rounded up to a mebibyte."""
    return f"{math.ceil(size_bytes / MIB)}Mi"


def labels(spec: JobSpec) -> dict[str, str]:
    """Return the labels of everything that belongs to this run."""
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
        # Ray's read tasks start in the raylet's folder, and resolve the job's relative paths there.
        working_dir=k.storage.mount_path,
        env=_env(spec),
        resources=_resources(size, k.worker),
        volume_mounts=mounts,
        security_context=container_security(),
    )


def _env(spec: JobSpec) -> list[EnvVar]:
    """Return the environment: values, and references to secrets. All pods share the model cache."""
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
    spec: JobSpec, settings: HeadPod | WorkerPod, container: Container, volumes: list[Volume]
) -> Pod:
    k = spec.kubernetes
    optional = {
        "volumes": volumes,
        "image_pull_secrets": [SecretName(name=name) for name in k.image_pull_secrets],
        "service_account_name": k.service_account,
        "priority_class_name": k.priority_class,
        "node_selector": settings.node_selector,
        "tolerations": _tolerations(settings),
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
    """Return settings that keep a container from gaining privileges."""
    return ContainerSecurity(
        allow_privilege_escalation=False, capabilities=Capabilities(drop=["ALL"])
    )


def _tolerations(settings: HeadPod | WorkerPod) -> list[PodToleration]:
    return [_toleration(one) for one in settings.tolerations]


def _toleration(one: Toleration) -> PodToleration:
    return PodToleration(**one.model_dump(exclude_none=True))


def _default_tolerations(worker: WorkerPod, size: PodSize) -> list[PodToleration]:
    """Return tolerations of the taints that GPU and spot machines usually carry."""
    out = []
    if size.gpus:
        out.append(PodToleration(key=worker.gpu_resource, operator="Exists", effect="NoSchedule"))
    if worker.spot:
        out += [PodToleration(key=key, operator="Exists") for key in SPOT_LABELS]
    return out


def _on_spot() -> Affinity:
    """Require a machine with the spot label of any cloud. The terms are alternatives."""
    terms = [
        NodeTerm(match_expressions=[Match(key=key, operator="In", values=[value])])
        for key, value in SPOT_LABELS.items()
    ]
    required = NodeTerms(node_selector_terms=terms)
    return Affinity(
        node_affinity=NodeAffinity(required_during_scheduling_ignored_during_execution=required)
    )
