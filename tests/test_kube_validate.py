"""Validation: what KubeRay and Kubernetes would refuse is refused here, each with its field, all at once."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pods import until
from test_render import EVERYTHING, job
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.kube import drain
from orchestrator.kube.kuberay import RayCluster, RayCronJob, RayJob
from orchestrator.kube.render import render
from orchestrator.kube.schema import Schemas, closed, read_crds, schema_problems, with_defaults
from orchestrator.kube.validate import problems_of, validate

OPERATOR_SCHEMAS = Path(__file__).parents[2] / "shared" / "kuberay"
KINDS: dict[str, tuple[Any, str]] = {
    "RayJob": (RayJob, "rayjobs"),
    "RayCluster": (RayCluster, "rayclusters"),
    "RayCronJob": (RayCronJob, "raycronjobs"),
}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the field at `a.b.0.c` set; Ellipsis removes it."""
    out = copy.deepcopy(document)
    here: Any = out
    *parents, last = path.split(".")
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return out


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    return render(job())[1]


@pytest.fixture(scope="module")
def ray_cluster() -> dict[str, Any]:
    return render(job(), cluster_only=True)[0]


def test_what_is_rendered_is_valid(ray_job: dict[str, Any], ray_cluster: dict[str, Any]) -> None:
    assert problems_of(ray_job) == []
    assert problems_of(ray_cluster) == []


HEAD = "spec.rayClusterSpec.headGroupSpec"
GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"
CLUSTER = "spec.rayClusterSpec"
REDIS = {"redisAddress": "redis://r:6379"}
POD = {"spec": {"containers": [{"name": "x", "image": "y"}]}}
ENV = f"{HEAD}.template.spec.containers.0.env"
RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}


def groups(*names: str) -> list[dict[str, Any]]:
    """Worker groups of these names."""
    return [{"groupName": name, "replicas": 1, "maxReplicas": 1, "template": POD} for name in names]


def rule(policy: str, seconds: int = 0, status: str = "FAILED") -> dict[str, Any]:
    """A deletion rule."""
    return {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": seconds}}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        # names
        ({"metadata.name": "a" * 48}, "metadata.name"),
        ({"metadata.name": "1a"}, "metadata.name"),
        ({"metadata.name": "a.b"}, "metadata.name"),
        ({"metadata.name": ..., "metadata.generateName": "a" * 43}, "metadata.name"),
        # ends
        ({"spec.suspend": True, "spec.shutdownAfterJobFinishes": False,
          "spec.ttlSecondsAfterFinished": 0}, "spec.suspend"),
        ({"spec.shutdownAfterJobFinishes": False}, "spec.ttlSecondsAfterFinished"),
        ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
        ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
        ({"spec.preRunningDeadlineSeconds": 0}, "spec.preRunningDeadlineSeconds"),
        ({"spec.backoffLimit": -1}, "spec.backoffLimit"),
        ({"spec.managedBy": "me"}, "spec.managedBy"),
        ({"spec.runtimeEnvYAML": "[1"}, "spec.runtimeEnvYAML"),
        ({"spec.runtimeEnvYAML": "pip"}, "spec.runtimeEnvYAML"),
        # modes
        ({"spec.submissionMode": "Sidecar"}, "spec.submissionMode"),
        ({"spec.submissionMode": "SidecarMode"}, "spec.submitterPodTemplate"),
        ({"spec.submissionMode": "SidecarMode"}, "spec.submitterConfig"),
        ({"spec.submissionMode": "SidecarMode", f"{HEAD}.template.spec.restartPolicy": "Always"},
         "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy"),
        ({"spec.submissionMode": "SidecarMode", "spec.clusterSelector": {"ray.io/cluster": "x"}},
         "spec.clusterSelector"),
        ({"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 1}, "spec.backoffLimit"),
        ({"spec.clusterSelector": {"ray.io/cluster": "x"}, "spec.backoffLimit": 1},
         "spec.backoffLimit"),
        ({"spec.clusterSelector": {"ray.io/cluster": "x"}, "spec.suspend": True}, "spec.suspend"),
        ({"spec.clusterSelector": {"a": "b"}}, "spec.clusterSelector"),
        ({"spec.rayClusterSpec": ...}, "spec"),
        # deletion
        ({"spec.deletionStrategy": {}}, "spec.deletionStrategy"),
        ({"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}, "spec.deletionStrategy"),
        ({"spec.deletionStrategy": {"deletionRules": [RULE]}}, "spec.shutdownAfterJobFinishes"),
        ({"spec.deletionStrategy": {"deletionRules": [RULE], "onSuccess": {"policy": "DeleteNone"}}},
         "spec.deletionStrategy"),
        ({"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteNone"},
                                    "onFailure": {"policy": "DeleteSelf"}}},
         "spec.deletionStrategy.onSuccess.policy"),
        ({"spec.deletionStrategy": {"onSuccess": {}, "onFailure": {"policy": "DeleteSelf"}}},
         "spec.deletionStrategy.onSuccess.policy"),
        ({"spec.deletionStrategy": {"deletionRules": [RULE, RULE]}},
         "spec.deletionStrategy.deletionRules[1].policy"),
        ({"spec.deletionStrategy": {"deletionRules": [rule("DeleteSelf", 5), rule("DeleteCluster", 9)]}},
         "spec.deletionStrategy.deletionRules"),
        ({"spec.deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}},
         "spec.deletionStrategy.deletionRules[0].condition"),
        ({"spec.deletionStrategy": {"deletionRules": [rule("DeleteWorkers")]},
          f"{CLUSTER}.enableInTreeAutoscaling": True},
         "spec.deletionStrategy.deletionRules[0].policy"),
        ({"spec.deletionStrategy": {"deletionRules": [rule("DeleteCluster")]},
          "spec.clusterSelector": {"ray.io/cluster": "x"}},
         "spec.deletionStrategy.deletionRules[0].policy"),
        # the cluster
        ({f"{HEAD}.template.spec.containers": []}, f"{HEAD}.template.spec.containers"),
        ({f"{HEAD}.resources": {"CPU": "1"}}, f"{HEAD}.resources"),
        ({f"{HEAD}.rayStartParams.labels": "a=b"}, f"{HEAD}.rayStartParams.labels"),
        ({f"{GROUP}.labels": {"a b": "c"}}, "spec.rayClusterSpec.workerGroupSpecs[0].labels.a b"),
        ({f"{GROUP}.minReplicas": 9}, "spec.rayClusterSpec.workerGroupSpecs[0].minReplicas"),
        ({f"{GROUP}.minReplicas": -1}, "spec.rayClusterSpec.workerGroupSpecs[0].minReplicas"),
        ({f"{GROUP}.numOfHosts": 0}, "spec.rayClusterSpec.workerGroupSpecs[0].numOfHosts"),
        ({f"{CLUSTER}.workerGroupSpecs": groups("a", "b", "a")},
         "spec.rayClusterSpec.workerGroupSpecs[2].groupName"),
        ({"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteCluster"},
                                    "onFailure": {"policy": "DeleteSelf"}},
          "spec.clusterSelector": {"ray.io/cluster": "x"}, "spec.shutdownAfterJobFinishes": False},
         "spec.deletionStrategy.onSuccess.policy"),
        ({f"{CLUSTER}.rayVersion": "2.40.0"}, f"{CLUSTER}.rayVersion"),
        ({f"{CLUSTER}.rayVersion": ...}, f"{CLUSTER}.rayVersion"),
        # Redis
        ({f"{HEAD}.rayStartParams.redis-password": "x", f"{CLUSTER}.gcsFaultToleranceOptions": REDIS},
         f"{HEAD}.rayStartParams.redis-password"),
        ({"metadata.annotations": {"ray.io/ft-enabled": "true"},
          f"{CLUSTER}.gcsFaultToleranceOptions": REDIS}, "metadata.annotations.ray.io/ft-enabled"),
        ({f"{HEAD}.rayStartParams.redis-username": "x"}, HEAD),
        ({ENV: [{"name": "REDIS_USERNAME", "value": "x"}]}, HEAD),
        ({ENV: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}, f"{HEAD}…env.RAY_REDIS_ADDRESS"),
        ({ENV: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}],
          f"{CLUSTER}.gcsFaultToleranceOptions": REDIS}, f"{HEAD}…env.RAY_REDIS_ADDRESS"),
        ({ENV: [{"name": "REDIS_PASSWORD", "value": "x"}],
          f"{CLUSTER}.gcsFaultToleranceOptions": REDIS}, f"{HEAD}…env.REDIS_PASSWORD"),
        ({"metadata.annotations": {"ray.io/external-storage-namespace": "x"},
          f"{CLUSTER}.gcsFaultToleranceOptions": REDIS},
         "metadata.annotations.ray.io/external-storage-namespace"),
        # the autoscaler
        ({f"{CLUSTER}.enableInTreeAutoscaling": True, f"{CLUSTER}.autoscalerOptions": {"version": "v2"},
          f"{GROUP}.template.spec.restartPolicy": "Always"},
         "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.restartPolicy"),
        ({f"{CLUSTER}.enableInTreeAutoscaling": True, f"{GROUP}.suspend": True},
         "spec.rayClusterSpec.workerGroupSpecs[0].suspend"),
        ({ENV: [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]},
         f"{HEAD}…env.RAY_enable_autoscaler_v2"),
        ({ENV: [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
          f"{CLUSTER}.enableInTreeAutoscaling": True, f"{CLUSTER}.autoscalerOptions": {"version": "v2"}},
         f"{CLUSTER}.autoscalerOptions.version"),
        ({ENV: [{"name": "RAY_enable_autoscaler_v2", "value": "true"}],
          f"{CLUSTER}.enableInTreeAutoscaling": True, f"{HEAD}.template.spec.restartPolicy": "Always"},
         f"{HEAD}.template.spec.restartPolicy"),
        # Kueue
        ({"metadata.labels": {"kueue.x-k8s.io/queue-name": "q"},
          f"{CLUSTER}.workerGroupSpecs": groups(*"abcdefgh")}, f"{CLUSTER}.workerGroupSpecs"),
        ({"metadata.labels": {"kueue.x-k8s.io/queue-name": "q"}, f"{CLUSTER}.enableInTreeAutoscaling": True},
         f"{CLUSTER}.enableInTreeAutoscaling"),
        ({"metadata.labels": {"kueue.x-k8s.io/queue-name": "q"}, "spec.shutdownAfterJobFinishes": False},
         "spec.shutdownAfterJobFinishes"),
        # fields
        ({"spec.entrypoint": 5}, "spec.entrypoint"),
        ({f"{CLUSTER}.rayVersoin": "2"}, f"{CLUSTER}.rayVersoin"),
        ({f"{GROUP}.replicas": "4"}, "spec.rayClusterSpec.workerGroupSpecs[0].replicas"),
        ({f"{GROUP}.replicas": 2**31}, "spec.rayClusterSpec.workerGroupSpecs[0].replicas"),
        ({f"{GROUP}.groupName": ...}, "spec.rayClusterSpec.workerGroupSpecs[0].groupName"),
        ({f"{GROUP}.template.spec.containers.0.image": 7},
         "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].image"),
        ({"spec.submitterPodTemplate.spec.restartPolcy": "Never"},
         "spec.submitterPodTemplate.spec.restartPolcy"),
    ],
)  # fmt: skip
def test_what_kuberay_refuses_is_refused_here_by_its_field(
    ray_job: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    for path, value in changes.items():
        ray_job = changed(ray_job, path, value)
    found = problems_of(ray_job)
    assert field in [problem.field for problem in found]
    assert all(problem.why for problem in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.ttlSecondsAfterFinished": ..., "spec.shutdownAfterJobFinishes": False},
        {"spec.shutdownAfterJobFinishes": ..., "spec.ttlSecondsAfterFinished": ...,
         "spec.deletionStrategy": {"deletionRules": [
             rule("DeleteWorkers", 0), rule("DeleteCluster", 60), rule("DeleteSelf", 60),
             rule("DeleteSelf", 0, "SUCCEEDED")]}},
        {"spec.submissionMode": "SidecarMode", "spec.submitterPodTemplate": ...,
         "spec.submitterConfig": ...},
        {"spec.suspend": None},
        {f"{GROUP}.minReplicas": ..., f"{GROUP}.maxReplicas": ...},
        {f"{CLUSTER}.enableInTreeAutoscaling": True, "metadata.labels": {"kueue.x-k8s.io/queue-name": "q"},
         "metadata.annotations": {"kueue.x-k8s.io/elastic-job": "true"}},
        {"metadata.name": ..., "metadata.generateName": "chat-"},
    ],
)  # fmt: skip
def test_what_kuberay_accepts_is_accepted(ray_job: dict[str, Any], changes: dict[str, Any]) -> None:
    for path, value in changes.items():
        ray_job = changed(ray_job, path, value)
    assert problems_of(ray_job) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"metadata.name": "a" * 37}, "metadata.name"),
        ({"spec.schedule": "often"}, "spec.schedule"),
        ({"spec.schedule": ...}, "spec.schedule"),
        ({"spec.jobTemplate.backoffLimit": -1}, "spec.jobTemplate.backoffLimit"),
        ({"spec.jobTemplate.rayClusterSpec.rayVersion": "2.40.0"},
         "spec.jobTemplate.rayClusterSpec.rayVersion"),
        ({"spec.jobTemplate.entrypont": "x"}, "spec.jobTemplate.entrypont"),
    ],
)  # fmt: skip
def test_a_job_on_a_schedule_keeps_the_same_rules(
    ray_job: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    cron: dict[str, Any] = {
        "apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "a" * 36},
        "spec": {"schedule": "0 3 * * *", "jobTemplate": ray_job["spec"]},
    }  # fmt: skip
    assert problems_of(cron) == []
    assert problems_of(changed(cron, "spec.schedule", "@daily")) == []
    for path, value in changes.items():
        cron = changed(cron, path, value)
    assert field in [problem.field for problem in problems_of(cron)]


NONSENSE: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [1], [{}], {"a": 1}, 2**40]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(choice=st.randoms(use_true_random=False), value=st.sampled_from(NONSENSE))
def test_nonsense_anywhere_is_a_problem_or_harmless_but_never_a_crash(
    ray_job: dict[str, Any], choice: Any, value: Any
) -> None:
    document = copy.deepcopy(ray_job)
    here: Any = document
    key: Any = choice.choice(["metadata", "spec"])
    while isinstance(here[key], dict | list) and here[key] and choice.random() < 0.85:
        here = here[key]
        key = choice.choice(list(here) if isinstance(here, dict) else range(len(here)))
    here[key] = value
    problems_of(document)


def test_a_typo_hides_no_broken_rule_and_every_object_is_looked_at(
    tmp_path: Path, ray_job: dict[str, Any], ray_cluster: dict[str, Any]
) -> None:
    bad = changed(changed(ray_job, "metadata.name", "B"), "spec.entrypont", "x")
    other = changed(ray_cluster, "spec.workerGroupSpecs.0.template.spec.nodeSelektor", {})
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "c"},
        "spc": {},
    }
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all([bad, other, claim]), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        validate(file)
    assert [problem.field for problem in caught.value.problems] == [
        "RayJob B: spec.entrypont",
        "RayJob B: metadata.name",
        "RayCluster chat: spec.workerGroupSpecs[0].template.spec.nodeSelektor",
        "PersistentVolumeClaim c: spc",
    ]


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "LocalQueue",
        "metadata": {"name": "q"},
    }
    file.write_text(yaml.safe_dump(queue), encoding="utf-8")
    checked = validate(file)
    assert checked.kinds == {"LocalQueue": 1}
    assert "--crds" in checked.unchecked[0]


@pytest.mark.parametrize("text", ["", "a: b", "- 1", "{", "apiVersion: 1\nkind: x\nmetadata: {}"])
def test_files_that_hold_no_objects_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError):
        validate(file)


def test_the_command_writes_yaml_and_checks_it(tmp_path: Path) -> None:
    source, target = tmp_path / "job.yaml", tmp_path / "manifests.yaml"
    source.write_text(
        "name: a\ntask: {type: causal_lm}\nmodel: {pretrained: org/m}\ndata: {train: not/here.jsonl}\n"
        "kubernetes: {image: r/o:1}\n",
        encoding="utf-8",
    )
    command = ["render", str(source), "--kuberay", "--cluster", "8xH100x2", "--kueue", "gpus", "--spot",
               "--gcs-ft", "redis://redis:6379", "--set", "name=b"]  # fmt: skip
    written = CliRunner().invoke(app, command)
    assert written.exit_code == 0, written.output
    target.write_text(written.output, encoding="utf-8")
    kinds = [one["kind"] for one in yaml.safe_load_all(written.output)]
    assert kinds == ["ConfigMap", "RayJob"]
    assert "# num_workers: one per GPU\n" in written.output
    assert "# pods: 8 worker(s) a pod" in written.output
    checked = CliRunner().invoke(app, ["render", "--validate", str(target)])
    assert checked.exit_code == 0, checked.output
    assert "1 RayJob" in checked.output


# --- the operator's own schemas


def operator_schema(kind: str) -> dict[str, Any]:
    """The schema that the operator installs; the test is skipped where the files are not to be had."""
    file = OPERATOR_SCHEMAS / f"{KINDS[kind][1]}.v1.json"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not in {OPERATOR_SCHEMAS}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["openAPIV3Schema"]
    return found


@pytest.mark.parametrize("cluster_only", [False, True])
@pytest.mark.parametrize("section", [{}, EVERYTHING, {"submission_mode": "SidecarMode"},
                                     {"cleanup": {"type": "keep"}, "token_auth": False}])  # fmt: skip
def test_the_operators_schema_accepts_what_is_rendered(
    section: dict[str, Any], cluster_only: bool
) -> None:
    one = render(job(**section), cluster_only)[-1]
    schema = closed(operator_schema(one["kind"]))
    assert schema_problems(with_defaults(one, schema), schema) == []


@pytest.mark.parametrize("kind", KINDS)
def test_our_models_are_the_operators_schemas(kind: str) -> None:
    differences: list[str] = []
    compare(KINDS[kind][0].model_json_schema(by_alias=True), operator_schema(kind), differences)
    assert differences == []


OPEN = {"apiVersion", "kind", "template", "submitterPodTemplate", "metadata", "status", "headService", "env", "envFrom",
        "volumeMounts", "resources", "securityContext", "valueFrom", "egressRules", "ingressRules"}  # fmt: skip
"""What tells kinds apart, and Kubernetes' core API, which we leave to Kubernetes' own schemas."""


def compare(ours: dict[str, Any], theirs: dict[str, Any], out: list[str]) -> None:
    """Names, types, enums, defaults and required fields, level by level."""
    _compare(ours, theirs, ours.get("$defs", {}), "", out)


def _compare(
    ours: dict[str, Any], theirs: dict[str, Any], defs: dict[str, Any], at: str, out: list[str]
) -> None:
    ours = _resolved(ours, defs)
    if "properties" in theirs:
        mine, other = ours.get("properties", {}), theirs["properties"]
        out += [f"{at}.{n}: unknown to us" for n in other if n not in mine]
        out += [f"{at}.{n}: unknown to the operator" for n in mine if n not in other]
        needed = {n for n in theirs.get("required", ()) if "default" not in other[n]}
        # At the top Kubernetes itself requires apiVersion, kind and metadata.
        if at and needed != set(ours.get("required", ())):
            out.append(f"{at}: required {sorted(needed)} {ours.get('required')}")
        for name in set(mine) & set(other) - OPEN:
            _compare(mine[name], other[name], defs, f"{at}.{name}", out)
        return
    if theirs.get("type") == "array":
        _compare(ours.get("items", {}), theirs["items"], defs, f"{at}[]", out)
        return
    enum = theirs.get("enum")
    if enum is not None and set(enum) != set(ours.get("enum", [ours.get("const")])):
        out.append(f"{at}: {enum} {ours}")
    if theirs.get("default") != ours.get("default"):
        out.append(f"{at}: default {theirs.get('default')} {ours.get('default')}")
    if theirs.get("type") and theirs["type"] != ours.get("type", theirs["type"]):
        out.append(f"{at}: type {theirs['type']} {ours.get('type')}")
    if theirs.get("minimum") is not None and theirs["minimum"] != ours.get("minimum"):
        out.append(f"{at}: minimum {theirs['minimum']}")


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """Through references, and through `X or null`."""
    if "$ref" in schema:
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return {**_resolved(defs[schema["$ref"].rsplit("/", 1)[1]], defs), **rest}
    options = [o for o in schema.get("anyOf", ()) if o != {"type": "null"}]
    if len(options) == 1:
        rest = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
        default = {"default": schema["default"]} if schema.get("default") is not None else {}
        return {**_resolved(options[0], defs), **rest, **default}
    return schema


def test_every_rule_in_the_operators_schema_has_one_here() -> None:
    """CEL rules cannot be read as JSON Schema; a new one has to be written into `rules`."""
    known = {
        "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))",
        "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))",
        "!(has(self.jobStatus) && has(self.jobDeploymentStatus))",
        "has(self.jobStatus) || has(self.jobDeploymentStatus)",
        "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']",
        "self == oldSelf",  # about changes; a file has none
    }
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.update(r["rule"] for r in value.get("x-kubernetes-validations", ()))
            for inner in value.values():
                walk(inner)

    walk(operator_schema("RayJob")["properties"]["spec"])
    assert found == known


def test_a_clusters_own_schemas_are_held_against_as_well(
    tmp_path: Path, ray_job: dict[str, Any]
) -> None:
    """An older operator does not know a field that we write."""
    schema = {"type": "object", "properties": {
        "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
        "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True,
                 "properties": {"entrypoint": {"type": "string", "maxLength": 3}}}}}  # fmt: skip
    crd = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "ray.io", "names": {"kind": "RayJob"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
        },
    }  # fmt: skip
    file = tmp_path / "crds.yaml"
    file.write_text(yaml.safe_dump({"kind": "List", "items": [crd]}), encoding="utf-8")
    crds: Schemas = read_crds(file)
    assert [p.field for p in problems_of(ray_job, crds)] == ["spec.entrypoint"]
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(OrchestratorError, match="kubectl get crd"):
        read_crds(tmp_path)


# --- drain


class FakeGcs:
    """GCS with two nodes; `busy` keeps a drained node alive."""

    def __init__(self, busy: bool = False) -> None:
        self.busy, self.drained = busy, ""

    def get_all_node_info(self, timeout: float) -> dict[bytes, Any]:
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        def node(name: str, address: str, gone: bool) -> Any:
            state = GcsNodeInfo.DEAD if gone else GcsNodeInfo.ALIVE
            return SimpleNamespace(instance_id=name, node_manager_address=address, state=state)

        gone = self.drained == b"b".hex() and not self.busy
        return {b"a": node("pod-a", "10.0.0.1", False), b"b": node("pod-b", "10.0.0.2", gone)}

    def drain_node(
        self, node_id: str, reason: int, message: str, deadline_ms: int
    ) -> tuple[bool, str]:
        self.drained = node_id
        return True, ""


@pytest.mark.parametrize(
    ("name", "address", "busy", "said", "drained"),
    [
        ("pod-b", "10.0.0.9", False, "gone", b"b".hex()),
        (None, "10.0.0.2", False, "gone", b"b".hex()),
        ("pod-b", "10.0.0.1", True, "still busy", b"b".hex()),
        ("pod-x", "10.0.0.9", False, "no node", ""),
    ],
)
def test_a_pod_drains_its_own_node_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    address: str,
    busy: bool,
    said: str,
    drained: str,
) -> None:
    gcs = FakeGcs(busy)
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: gcs)
    monkeypatch.setattr(drain, "_own_address", lambda _: address)
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    monkeypatch.delenv("RAY_CLOUD_INSTANCE_ID", raising=False)
    if name:
        monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", name)
    assert said in drain.drain("head:6379", deadline_s=0.1)
    assert gcs.drained == drained


def run_hook(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """The hook, as a pod runs it."""
    monkeypatch.setattr("sys.argv", ["drain", *words])
    drain.main()


def test_the_pod_with_the_driver_has_it_commit_and_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing but drivers is asked, and they get the time they need, no more than there is."""
    script = (
        "import signal, sys, time\n"
        "def leave(*_): time.sleep(0.3); open(sys.argv[-1], 'a').write('left'); sys.exit(130)\n"
        "signal.signal(15, leave); open(sys.argv[-1], 'w').close(); time.sleep(60)"
    )
    place = [tmp_path / name for name in ("driver", "other")]
    words = (["-m", "orchestrator", "train"], ["-m", "orchestrator", "plan"])
    commands = [
        [sys.executable, "-c", script, *w, str(p)] for w, p in zip(words, place, strict=True)
    ]
    driver, other = (subprocess.Popen(command) for command in commands)
    try:
        until(lambda: all(p.exists() for p in place), "both are up", 30)
        mine = {p.pid: psutil.Process(p.pid) for p in (driver, other)}
        for process in mine.values():
            process.info = {"cmdline": process.cmdline()}
        monkeypatch.setattr("psutil.process_iter", lambda fields: list(mine.values()))
        run_hook(monkeypatch, "--deadline-s", "20", "--head")
        assert place[0].read_text() == "left", "it had the time to"
        assert other.poll() is None
        assert "1 driver(s) asked" in capsys.readouterr().err
    finally:
        for process in (driver, other):
            process.kill()
            process.wait(10)


def test_a_head_without_a_driver_stays_until_the_other_nodes_are_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gcs = FakeGcs()
    monkeypatch.setattr("psutil.process_iter", lambda fields: [])
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: gcs)
    monkeypatch.setattr(drain, "_own_address", lambda _: "10.0.0.1")
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    run_hook(monkeypatch, "--deadline-s", "0.1", "--head", "--address", "head:6379")
    assert "still here after 0.1 s" in capsys.readouterr().err
    gcs.drained = b"b".hex()
    run_hook(monkeypatch, "--deadline-s", "20", "--head", "--address", "head:6379")
    assert "no other node is left" in capsys.readouterr().err


def test_a_pod_whose_head_is_gone_ends_without_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_hook(monkeypatch, "--deadline-s", "30", "--address", "127.0.0.1:1")
    assert "not drained" in capsys.readouterr().err
