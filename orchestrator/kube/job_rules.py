"""The operator's rules for RayJobs. `rules` says where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import yaml

from orchestrator.errors import Problem
from orchestrator.kube.cluster_rules import cluster_rules, restart_policy
from orchestrator.kube.kuberay import DeletionStrategy, RayJobSpec

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def job_rules(spec: RayJobSpec, annotations: dict[str, str], at: str) -> Iterator[Problem]:
    """What a RayJob's `spec` breaks; `at` is where it stands."""
    yield from _job_ends(spec, at)
    yield from _job_mode(spec, at)
    yield from _deletion(spec, at)
    if spec.ray_cluster_spec is not None:
        yield from cluster_rules(spec.ray_cluster_spec, annotations, f"{at}.rayClusterSpec")
    try:
        environment = yaml.safe_load(spec.runtime_env_yaml or "{}")
    except (yaml.YAMLError, ValueError):
        environment = None
    if not isinstance(environment, dict):
        yield Problem(f"{at}.runtimeEnvYAML", "is not a YAML mapping", "as in `pip: [requests]`")


def _job_ends(spec: RayJobSpec, at: str) -> Iterator[Problem]:
    if spec.suspend and not spec.shutdown_after_job_finishes:
        yield Problem(f"{at}.suspend", "needs shutdownAfterJobFinishes", "set it to true", True)
    if spec.ttl_seconds_after_finished < 0:
        yield Problem(
            f"{at}.ttlSecondsAfterFinished",
            "is negative",
            "0 or more",
            spec.ttl_seconds_after_finished,
        )
    elif spec.ttl_seconds_after_finished and not spec.shutdown_after_job_finishes:
        yield Problem(
            f"{at}.ttlSecondsAfterFinished",
            "needs shutdownAfterJobFinishes",
            "set that to true, or drop this one",
            spec.ttl_seconds_after_finished,
        )
    if spec.active_deadline_seconds is not None and spec.active_deadline_seconds <= 0:
        yield Problem(
            f"{at}.activeDeadlineSeconds", "must be positive", "drop it for none", spec.active_deadline_seconds
        )  # fmt: skip
    if spec.backoff_limit < 0:
        yield Problem(f"{at}.backoffLimit", "is negative", "0 or more", spec.backoff_limit)


def _job_mode(spec: RayJobSpec, at: str) -> Iterator[Problem]:
    mode, selector, cluster = spec.submission_mode, spec.cluster_selector, spec.ray_cluster_spec
    if mode not in SUBMISSION_MODES:
        yield Problem(f"{at}.submissionMode", "is not a mode", ", ".join(SUBMISSION_MODES), mode)
    if cluster is None and not selector:
        yield Problem(at, "needs rayClusterSpec or clusterSelector", "give one of them")
    if selector:
        if not selector.get("ray.io/cluster"):
            yield Problem(f"{at}.clusterSelector", "names no cluster", "ray.io/cluster: NAME")
        if spec.suspend:
            yield Problem(f"{at}.suspend", "is not possible with clusterSelector", "drop one", True)
        if spec.backoff_limit > 0:
            yield Problem(
                f"{at}.backoffLimit",
                "is not possible with clusterSelector: a retry is a new cluster",
                "drop it",
                spec.backoff_limit,
            )
        if mode == "SidecarMode":
            yield Problem(
                f"{at}.clusterSelector",
                "is not possible in SidecarMode",
                "use K8sJobMode or HTTPMode",
            )
    if mode == "InteractiveMode" and spec.backoff_limit > 0:
        yield Problem(
            f"{at}.backoffLimit",
            "is not possible in InteractiveMode",
            "drop it",
            spec.backoff_limit,
        )
    if mode == "SidecarMode":
        for field in ("submitter_pod_template", "submitter_config"):
            if getattr(spec, field) is not None:
                yield Problem(
                    f"{at}.{_camel(field)}",
                    "has no place in SidecarMode",
                    "drop it, or use K8sJobMode",
                )
        if cluster is not None:
            path = f"{at}.rayClusterSpec.headGroupSpec"
            yield from restart_policy(cluster.head_group_spec.template, path, "SidecarMode")


def _deletion(spec: RayJobSpec, at: str) -> Iterator[Problem]:
    strategy, path = spec.deletion_strategy, f"{at}.deletionStrategy"
    if strategy is None:
        return
    old = (strategy.on_success, strategy.on_failure)
    rules = strategy.deletion_rules
    if rules and any(old):
        yield Problem(path, "mixes deletionRules with onSuccess or onFailure", "keep deletionRules")
    if not rules and not all(old):
        yield Problem(path, "needs deletionRules, or both onSuccess and onFailure", "deletionRules")
    if rules and spec.shutdown_after_job_finishes:
        yield Problem(
            f"{at}.shutdownAfterJobFinishes", "excludes deletionRules", "drop one of the two", True
        )
    yield from _old_deletion(spec, strategy, path, at)
    yield from _deletion_rules(spec, strategy, f"{path}.deletionRules")


def _old_deletion(
    spec: RayJobSpec, strategy: DeletionStrategy, path: str, at: str
) -> Iterator[Problem]:
    pair = (("onSuccess", strategy.on_success), ("onFailure", strategy.on_failure))
    for name, one in pair:
        if one is None:
            continue
        if one.policy is None:
            yield Problem(f"{path}.{name}.policy", "is required", "DeleteCluster")
        elif spec.shutdown_after_job_finishes and one.policy == "DeleteNone":
            yield Problem(
                f"{path}.{name}.policy",
                f"contradicts {at}.shutdownAfterJobFinishes",
                "DeleteCluster, or no shutdown",
                one.policy,
            )
        else:
            yield from _policy(spec, one.policy, f"{path}.{name}.policy")


def _policy(spec: RayJobSpec, policy: str, path: str) -> Iterator[Problem]:
    if spec.cluster_selector and policy in ("DeleteCluster", "DeleteWorkers"):
        yield Problem(
            path, "is not possible with clusterSelector", "DeleteSelf or DeleteNone", policy
        )
    cluster = spec.ray_cluster_spec
    if policy == "DeleteWorkers" and cluster is not None and cluster.enable_in_tree_autoscaling:
        yield Problem(path, "is not possible with the autoscaler", "DeleteCluster", policy)


def _deletion_rules(spec: RayJobSpec, strategy: DeletionStrategy, path: str) -> Iterator[Problem]:
    seconds: dict[str, dict[str, int]] = {}
    for index, rule in enumerate(strategy.deletion_rules or ()):
        here, condition = f"{path}[{index}]", rule.condition
        if (condition.job_status is None) == (condition.job_deployment_status is None):
            yield Problem(
                f"{here}.condition",
                "needs one of jobStatus and jobDeploymentStatus",
                "keep exactly one",
            )
        yield from _policy(spec, rule.policy, f"{here}.policy")
        state: str = condition.job_status or condition.job_deployment_status or ""
        if rule.policy in seconds.setdefault(state, {}):
            yield Problem(f"{here}.policy", f"stands twice for {state}", "keep one", rule.policy)
        seconds[state][rule.policy] = condition.ttl_seconds
    for state, given in seconds.items():
        for first, then in pairwise(policy for policy in DELETION_ORDER if policy in given):
            if given[then] < given[first]:
                yield Problem(
                    path,
                    f"{state}: {then} after {given[then]} s comes before {first} after {given[first]} s",
                    f"{then} after {given[first]} s or more",
                )


def _camel(field: str) -> str:
    first, *rest = field.split("_")
    return first + "".join(word.title() for word in rest)
