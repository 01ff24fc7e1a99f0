"""Typed manifests: what all of them share, and the parts of Kubernetes' core API that `render` writes.

Names are Python's here and Kubernetes' in the output. Any other field is merged in from the job file.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Manifest(BaseModel):
    """A part of a manifest: frozen, closed to unknown fields, and as strict about types as the API server."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=True
    )

    def dump(self) -> dict[str, Any]:
        """Return the fields that were given, as Kubernetes spells them."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)


class ObjectMeta(Manifest):
    """An object's `metadata`."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Object(Manifest):
    """A whole object."""

    api_version: str
    kind: str
    metadata: ObjectMeta

    def dump(self) -> dict[str, Any]:
        """Return the object as Kubernetes spells it, with its kind and API version."""
        return {"apiVersion": self.api_version, "kind": self.kind, **super().dump()}


class KeyRef(Manifest):
    """A key of a Secret."""

    name: str
    key: str


class ValueFrom(Manifest):
    """The source of a variable's value."""

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
    """A folder that lives as long as its pod; in memory with `medium: Memory`."""

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
    """Quantities. Requests equal limits, so these pods are evicted last."""

    requests: dict[str, str]
    limits: dict[str, str]


class Capabilities(Manifest):
    """Linux capabilities."""

    drop: list[str]


class Seccomp(Manifest):
    """A profile of allowed system calls."""

    type: str


class ContainerSecurity(Manifest):
    """The settings that the `restricted` Pod Security Standard requires of a container."""

    allow_privilege_escalation: bool
    capabilities: Capabilities


class PodSecurity(Manifest):
    """The settings that the `restricted` Pod Security Standard requires of a pod."""

    run_as_non_root: bool
    run_as_user: int
    fs_group: int
    fs_group_change_policy: str
    seccomp_profile: Seccomp


class Exec(Manifest):
    """A command, run without a shell."""

    command: list[str]


class Handler(Manifest):
    """The action of a hook."""

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
    """The nodes that a pod may run on."""

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
    """A template from which pods are created."""

    metadata: ObjectMeta | None = None
    spec: Pod


class ConfigMap(Object):
    """Small files."""

    api_version: str = "v1"
    kind: str = "ConfigMap"
    data: dict[str, str]
