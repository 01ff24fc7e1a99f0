"""The operator's rules for RayClusters. `rules` says where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Problem
from orchestrator.kube.kuberay import HeadGroupSpec, RayClusterSpec, WorkerGroupSpec

FT_ANNOTATION = "ray.io/ft-enabled"
STORAGE_ANNOTATION = "ray.io/external-storage-namespace"
LABEL_KEY = re.compile(
    r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def cluster_rules(spec: RayClusterSpec, annotations: dict[str, str], at: str) -> Iterator[Problem]:
    """What a RayCluster's `spec` breaks; `at` is where it stands."""
    head = spec.head_group_spec
    yield from _group(head, f"{at}.headGroupSpec")
    names: set[str] = set()
    for index, group in enumerate(spec.worker_group_specs or ()):
        here = f"{at}.workerGroupSpecs[{index}]"
        yield from _group(group, here)
        yield from _worker_group(spec, group, here)
        if group.group_name in names:
            yield Problem(f"{here}.groupName", "stands twice", "another name", group.group_name)
        names.add(group.group_name)
    yield from _redis(spec, annotations, at)
    yield from _autoscaler(spec, at)
    auth = spec.auth_options
    if auth is not None and auth.mode == "token" and not _at_least(spec.ray_version, (2, 52)):
        yield Problem(
            f"{at}.rayVersion",
            "must be 2.52.0 or later for authOptions.mode: token",
            "the image's Ray version, as in 2.60.0",
            spec.ray_version or "",
        )


def _group(group: HeadGroupSpec | WorkerGroupSpec, at: str) -> Iterator[Problem]:
    if not _containers(group.template):
        yield Problem(f"{at}.template.spec.containers", "needs at least one container")
    params = group.ray_start_params or {}
    twice = [n for n in ("num-cpus", "num-gpus", "memory", "resources") if params.get(n)]
    if twice and group.resources:
        yield Problem(f"{at}.resources", f"excludes rayStartParams {', '.join(twice)}", "keep one")
    if "labels" in params:
        yield Problem(f"{at}.rayStartParams.labels", "is not supported", f"use {at}.labels")
    for key, value in (group.labels or {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield Problem(
                f"{at}.labels.{key}",
                "is no label",
                "letters, digits, '-', '_', '.', at most 63",
                value,
            )


def _worker_group(spec: RayClusterSpec, group: WorkerGroupSpec, at: str) -> Iterator[Problem]:
    least, most = group.min_replicas, group.max_replicas
    if least < 0 or group.num_of_hosts < 1:
        field = "minReplicas" if least < 0 else "numOfHosts"
        yield Problem(f"{at}.{field}", "is too small", "minReplicas ≥ 0, numOfHosts ≥ 1")
    if least > most:
        yield Problem(f"{at}.minReplicas", f"exceeds maxReplicas = {most}", "raise one", least)
    if group.suspend and spec.enable_in_tree_autoscaling:
        yield Problem(f"{at}.suspend", "is not possible with the autoscaler", "drop one", True)


def _redis(spec: RayClusterSpec, annotations: dict[str, str], at: str) -> Iterator[Problem]:
    params = spec.head_group_spec.ray_start_params or {}
    variables, path = _variables(spec.head_group_spec.template), f"{at}.headGroupSpec"
    fix = "use gcsFaultToleranceOptions"
    options = spec.gcs_fault_tolerance_options
    if params.get("redis-username") or "REDIS_USERNAME" in variables:
        yield Problem(path, "sets the Redis user by hand", f"{fix}.redisUsername")
    if options is None:
        if (
            "RAY_REDIS_ADDRESS" in variables
            and annotations.get(FT_ANNOTATION, "").lower() != "true"
        ):
            yield Problem(f"{path}…env.RAY_REDIS_ADDRESS", "is set by hand", f"{fix}.redisAddress")
        return
    if annotations.get(FT_ANNOTATION):
        yield Problem(f"metadata.annotations.{FT_ANNOTATION}", "has been replaced", fix)
    if annotations.get(STORAGE_ANNOTATION):
        yield Problem(
            f"metadata.annotations.{STORAGE_ANNOTATION}",
            "is set beside gcsFaultToleranceOptions",
            f"{fix}.externalStorageNamespace",
        )
    if params.get("redis-password"):
        yield Problem(
            f"{path}.rayStartParams.redis-password", "is set by hand", f"{fix}.redisPassword"
        )
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if name in variables:
            yield Problem(f"{path}…env.{name}", "is set by hand", f"{fix}.{field}")


def _autoscaler(spec: RayClusterSpec, at: str) -> Iterator[Problem]:
    variables = _variables(spec.head_group_spec.template)
    switch = variables.get("RAY_enable_autoscaler_v2")
    options = spec.autoscaler_options
    version = options.version if options else None
    if not spec.enable_in_tree_autoscaling:
        if switch in ("1", "true"):
            yield Problem(
                f"{at}.headGroupSpec…env.RAY_enable_autoscaler_v2",
                "has no autoscaler to switch",
                "enableInTreeAutoscaling: true",
                switch,
            )
        return
    if version and switch is not None:
        yield Problem(
            f"{at}.autoscalerOptions.version",
            "stands beside the head's RAY_enable_autoscaler_v2",
            "drop the variable",
            version,
        )
    if version == "v2" or switch in ("1", "true"):
        groups = enumerate(spec.worker_group_specs or ())
        yield from restart_policy(
            spec.head_group_spec.template, f"{at}.headGroupSpec", "autoscaler v2"
        )
        for index, group in groups:
            path = f"{at}.workerGroupSpecs[{index}]"
            yield from restart_policy(group.template, path, "autoscaler v2")


def restart_policy(template: dict[str, Any], at: str, reason: str) -> Iterator[Problem]:
    """A pod that Kubernetes would restart, where `reason` forbids it."""
    policy = _pod(template).get("restartPolicy")
    if policy not in (None, "", "Never"):
        yield Problem(
            f"{at}.template.spec.restartPolicy",
            f"must be Never or unset with {reason}",
            "Never",
            policy,
        )


def _pod(template: dict[str, Any]) -> dict[str, Any]:
    """A template's pod. What is malformed counts as absent: Kubernetes' schema names it."""
    spec = template.get("spec")
    return spec if isinstance(spec, dict) else {}


def _containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return _mappings(_pod(template).get("containers"))


def _variables(template: dict[str, Any]) -> dict[str, Any]:
    """Environment of the Ray container, which is the first one."""
    first = (_containers(template) or [{}])[0]
    return {str(one.get("name")): one.get("value", "") for one in _mappings(first.get("env"))}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _at_least(version: str | None, least: tuple[int, int]) -> bool:
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return found is not None and (int(found[1]), int(found[2])) >= least
