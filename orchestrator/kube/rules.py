"""Rules that no schema holds: the operator (KubeRay 1.7) and Kueue refuse what breaks them.

`ray-operator/controllers/ray/utils/validation.go` in the KubeRay repository is the reference for the
operator's, `pkg/controller/jobs/rayjob/rayjob_webhook.go` in Kueue's for Kueue's. Both stop at the first;
these are all told at once. Objects have passed their schema, with defaults applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.errors import Problem
from orchestrator.kube.base import ObjectMeta
from orchestrator.kube.cluster_rules import cluster_rules
from orchestrator.kube.job_rules import job_rules
from orchestrator.kube.kuberay import RayCluster, RayClusterSpec, RayCronJob, RayJob, RayJobSpec
from orchestrator.kube.text import MAX_RAYCLUSTER_NAME, MAX_RAYJOB_NAME

MAX_RAYCRONJOB_NAME = 36
MAX_KUEUE_WORKER_GROUPS = 7
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"


def broken_rules(one: RayJob | RayCluster | RayCronJob) -> list[Problem]:
    """Every such rule that an object breaks."""
    return list(_of(one))


def _of(one: RayJob | RayCluster | RayCronJob) -> Iterator[Problem]:
    annotations = one.metadata.annotations
    queued = QUEUE_LABEL in one.metadata.labels
    match one:
        case RayJob():
            yield from _name(one.metadata, MAX_RAYJOB_NAME)
            yield from job_rules(one.spec, annotations, "spec")
            if queued and not one.spec.cluster_selector:
                yield from _kueue_job(one.spec, annotations)
        case RayCluster():
            yield from _name(one.metadata, MAX_RAYCLUSTER_NAME)
            yield from cluster_rules(one.spec, annotations, "spec")
            if queued:
                yield from _kueue_cluster(one.spec, annotations, "spec")
        case RayCronJob():
            yield from _name(one.metadata, MAX_RAYCRONJOB_NAME)
            if len(one.spec.schedule.split()) != 5 and not one.spec.schedule.startswith("@"):
                yield Problem(
                    "spec.schedule",
                    "is no cron schedule",
                    "five fields: 0 3 * * *",
                    one.spec.schedule,
                )
            yield from job_rules(one.spec.job_template, {}, "spec.jobTemplate")


def _name(metadata: ObjectMeta, limit: int) -> Iterator[Problem]:
    name = metadata.name
    if name is None and metadata.generate_name:
        name = f"{metadata.generate_name}xxxxx"  # Kubernetes appends five letters
    if not name:
        yield Problem("metadata.name", "is required")
        return
    if len(name) > limit:
        yield Problem(
            "metadata.name",
            f"has {len(name)} characters",
            f"at most {limit}: KubeRay appends to it",
            name,
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield Problem(
            "metadata.name",
            "is no DNS-1035 label",
            "lower-case letters, digits and '-', starting with a letter",
            name,
        )


def _kueue_job(spec: RayJobSpec, annotations: dict[str, str]) -> Iterator[Problem]:
    if not spec.shutdown_after_job_finishes:
        yield Problem(
            "spec.shutdownAfterJobFinishes",
            "must be true for Kueue: a finished job gives its quota back",
            "set it to true (kubernetes.cleanup.type: shutdown)",
        )
    if spec.ray_cluster_spec is not None:
        yield from _kueue_cluster(spec.ray_cluster_spec, annotations, "spec.rayClusterSpec")


def _kueue_cluster(spec: RayClusterSpec, annotations: dict[str, str], at: str) -> Iterator[Problem]:
    if spec.enable_in_tree_autoscaling and annotations.get(ELASTIC_ANNOTATION) != "true":
        yield Problem(
            f"{at}.enableInTreeAutoscaling",
            f"needs Kueue's ElasticJobsViaWorkloadSlices and the annotation {ELASTIC_ANNOTATION}",
            f'annotation {ELASTIC_ANNOTATION}: "true", or a fixed number of workers',
            True,
        )
    groups = len(spec.worker_group_specs or ())
    if groups > MAX_KUEUE_WORKER_GROUPS:
        yield Problem(
            f"{at}.workerGroupSpecs", f"{groups} groups", f"Kueue takes {MAX_KUEUE_WORKER_GROUPS}"
        )
