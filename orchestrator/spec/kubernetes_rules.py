"""Rules across the fields of `kubernetes:`; what the operator adds to them stands in `kube/rules.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.errors import Problem
from orchestrator.spec.job import JobSpec
from orchestrator.spec.kubernetes import DeletionRules

REDIS = re.compile(r"rediss?://[A-Za-z0-9._-]+:\d+(,rediss?://[A-Za-z0-9._-]+:\d+)*")


def kubernetes_rules(spec: JobSpec) -> Iterator[Problem]:
    """Yield contradictions in the Kubernetes section, found before anything is rendered."""
    k = spec.kubernetes
    for name in sorted(set(spec.runtime.env_vars) & set(k.secret_env)):
        yield Problem(
            f"runtime.env_vars.{name}", "stands in kubernetes.secret_env too", "keep one of the two"
        )
    for name, pod in (("head", k.head), ("worker", k.worker)):
        for index, one in enumerate(pod.tolerations):
            at = f"kubernetes.{name}.tolerations.{index}"
            if (one.operator == "Equal") != (one.value is not None):
                yield Problem(f"{at}.value", "goes with operator: Equal", "give both or neither")
            if one.key is None and one.operator == "Equal":
                yield Problem(f"{at}.key", "is required with operator: Equal", "the taint's key")
    if k.gcs_fault_tolerance and not REDIS.fullmatch(k.gcs_fault_tolerance.redis):
        yield Problem(  # the value is not shown: it may hold a password
            "kubernetes.gcs_fault_tolerance.redis",
            "is not redis://host:port or rediss://host:port",
            "the password goes into gcs_fault_tolerance.password, as a Secret's name and key",
        )
    if k.s3 and k.s3.endpoint_url and not re.match(r"https?://[^@\s]+$", k.s3.endpoint_url):
        yield Problem("kubernetes.s3.endpoint_url", "is no http(s) URL without credentials")
    if k.kueue and isinstance(k.cleanup, DeletionRules):
        yield Problem(
            "kubernetes.cleanup.type",
            "excludes kueue: Kueue wants a cluster that goes with its job",
            "shutdown",
            "rules",
        )
