"""The parts of Kubernetes' core API that we write. Anything else is merged in from the job file."""

from __future__ import annotations

from orchestrator.kube.base import Manifest, Object, ObjectMeta


class KeyRef(Manifest):
    """A key of a Secret."""

    name: str
    key: str


class ValueFrom(Manifest):
    """Where a value is kept."""

    secret_key_ref: KeyRef


class EnvVar(Manifest):
    """An environment variable: a value, or a reference to one."""

    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class VolumeMount(Manifest):
    """A volume inside a container."""

    name: str
    mount_path: str
    read_only: bool | None = None


class EmptyDir(Manifest):
    """A folder that lives as long as its pod; in memory where `medium` says so."""

    medium: str | None = None
    size_limit: str | None = None


class ClaimVolume(Manifest):
    """A PersistentVolumeClaim."""

    claim_name: str


class ConfigMapVolume(Manifest):
    """The files of a ConfigMap."""

    name: str


class Volume(Manifest):
    """One source of files."""

    name: str
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: ClaimVolume | None = None
    config_map: ConfigMapVolume | None = None


class Resources(Manifest):
    """Quantities. Requests equal limits here, which makes pods the last to be evicted."""

    requests: dict[str, str]
    limits: dict[str, str]


class Capabilities(Manifest):
    """Linux capabilities."""

    drop: list[str]


class Seccomp(Manifest):
    """System calls that are let through."""

    type: str


class ContainerSecurity(Manifest):
    """What the `restricted` Pod Security Standard asks of a container."""

    allow_privilege_escalation: bool
    capabilities: Capabilities


class PodSecurity(Manifest):
    """What the `restricted` Pod Security Standard asks of a pod."""

    run_as_non_root: bool
    run_as_user: int
    fs_group: int
    fs_group_change_policy: str
    seccomp_profile: Seccomp


class Exec(Manifest):
    """A command, run without a shell."""

    command: list[str]


class Handler(Manifest):
    """What a hook does."""

    exec: Exec


class Lifecycle(Manifest):
    """Hooks of a container."""

    pre_stop: Handler


class Container(Manifest):
    """One container."""

    name: str
    image: str
    image_pull_policy: str
    working_dir: str | None = None
    env: list[EnvVar] | None = None
    resources: Resources
    volume_mounts: list[VolumeMount] | None = None
    security_context: ContainerSecurity
    lifecycle: Lifecycle | None = None


class PodToleration(Manifest):
    """A taint that is tolerated."""

    key: str | None = None
    operator: str | None = None
    value: str | None = None
    effect: str | None = None


class Match(Manifest):
    """A condition on a node's labels."""

    key: str
    operator: str
    values: list[str]


class NodeTerm(Manifest):
    """Conditions that must all hold."""

    match_expressions: list[Match]


class NodeTerms(Manifest):
    """Terms of which one must hold."""

    node_selector_terms: list[NodeTerm]


class NodeAffinity(Manifest):
    """Nodes a pod may run on."""

    required_during_scheduling_ignored_during_execution: NodeTerms


class Affinity(Manifest):
    """Where a pod may run."""

    node_affinity: NodeAffinity


class SecretName(Manifest):
    """A Secret by name."""

    name: str


class Pod(Manifest):
    """A pod's `spec`."""

    containers: list[Container]
    volumes: list[Volume] | None = None
    security_context: PodSecurity
    image_pull_secrets: list[SecretName] | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    priority_class_name: str | None = None
    node_selector: dict[str, str] | None = None
    tolerations: list[PodToleration] | None = None
    affinity: Affinity | None = None
    restart_policy: str | None = None
    termination_grace_period_seconds: int | None = None


class PodTemplate(Manifest):
    """A pod to be made."""

    metadata: ObjectMeta | None = None
    spec: Pod


class ConfigMap(Object):
    """Small files."""

    api_version: str = "v1"
    kind: str = "ConfigMap"
    data: dict[str, str]
