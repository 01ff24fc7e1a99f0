"""Test that settings which KubeRay, Kueue or Kubernetes would refuse are refused with their fields."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_render import EVERYTHING, job
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import SpecError
from orchestrator.kube.kuberay import RayCluster, RayJob
from orchestrator.kube.render import render

OPERATOR_SCHEMAS = Path(__file__).parents[2] / "shared" / "kuberay"
KINDS: dict[str, tuple[Any, str]] = {
    "RayJob": (RayJob, "rayjobs"),
    "RayCluster": (RayCluster, "rayclusters"),
}
ELASTIC = {"num_workers": {"min": 8, "max": 32}}
REDIS = {"redis": "redis://r:6379"}
QUEUE = {"kueue": {"queue": "gpus"}}
CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs[0]"
DELETION = "spec.deletionStrategy.deletionRules"
SWITCH = "RAY_enable_autoscaler_v2"
REFERENCE = {"secretKeyRef": {"name": "redis", "key": "password"}}
PASSWORD = {"name": "ray-head", "env": [{"name": "REDIS_PASSWORD", "valueFrom": REFERENCE}]}


def head_env(name: str) -> str:
    """Return the path of a variable of the head's container."""
    return f"{HEAD}.template.spec.containers[0].env.{name}"


def env(name: str, value: str = "x") -> dict[str, Any]:
    """Return pod settings with one more variable in the head's container."""
    return pod(containers=[{"name": "ray-head", "env": [{"name": name, "value": value}]}])


def pod(**fields: Any) -> dict[str, Any]:
    """Return pod settings with fields of its `spec`."""
    return {"pod": {"spec": fields}}


def deletion(*rules: tuple[str, str, int]) -> dict[str, Any]:
    """Return clean-up by rules of (end, policy, seconds)."""
    entries = [{"on": on, "policy": policy, "after_s": after} for on, policy, after in rules]
    return {"cleanup": {"type": "rules", "rules": entries}}


@pytest.mark.parametrize(
    ("resources", "section", "field"),
    [
        # deletion
        ({}, deletion(("FAILED", "DeleteSelf", 0), ("FAILED", "DeleteSelf", 9)), f"{DELETION}[1].policy"),
        ({}, deletion(("FAILED", "DeleteSelf", 5), ("FAILED", "DeleteCluster", 9)), DELETION),
        ({}, deletion(("FAILED", "DeleteCluster", 5), ("FAILED", "DeleteWorkers", 9)), DELETION),
        (ELASTIC, deletion(("FAILED", "DeleteWorkers", 0)), f"{DELETION}[0].policy"),
        # Redis
        ({}, {"head": env("REDIS_USERNAME")}, head_env("REDIS_USERNAME")),
        ({}, {"head": env("RAY_REDIS_ADDRESS")}, head_env("RAY_REDIS_ADDRESS")),
        ({}, {"head": env("RAY_REDIS_ADDRESS"), "gcs_fault_tolerance": REDIS},
         head_env("RAY_REDIS_ADDRESS")),
        ({}, {"head": pod(containers=[PASSWORD]), "gcs_fault_tolerance": REDIS}, head_env("REDIS_PASSWORD")),
        ({}, {"annotations": {"ray.io/ft-enabled": "true"}, "gcs_fault_tolerance": REDIS},
         "metadata.annotations.ray.io/ft-enabled"),
        ({}, {"annotations": {"ray.io/external-storage-namespace": "x"}, "gcs_fault_tolerance": REDIS},
         "metadata.annotations.ray.io/external-storage-namespace"),
        # the autoscaler
        ({}, {"head": env(SWITCH, "1")}, head_env(SWITCH)),
        (ELASTIC, {"head": env(SWITCH, "0")}, head_env(SWITCH)),
        (ELASTIC, {"head": pod(restartPolicy="Always")}, f"{HEAD}.template.spec.restartPolicy"),
        (ELASTIC, {"worker": pod(restartPolicy="Always")}, f"{WORKERS}.template.spec.restartPolicy"),
        # modes
        ({}, {"submission_mode": "SidecarMode", "head": pod(restartPolicy="OnFailure")},
         f"{HEAD}.template.spec.restartPolicy"),
        # Kueue
        (ELASTIC, QUEUE, f"{CLUSTER}.enableInTreeAutoscaling"),
        ({}, {**QUEUE, "cleanup": {"type": "keep"}}, "spec.shutdownAfterJobFinishes"),
        ({}, {"labels": {"kueue.x-k8s.io/queue-name": "q"}, "cleanup": {"type": "keep"}},
         "spec.shutdownAfterJobFinishes"),
        # pods
        ({}, {"worker": pod(hostNetwrok=True)}, f"{WORKERS}.template.spec.hostNetwrok"),
        ({}, {"head": pod(hostNetwork="yes")}, f"{HEAD}.template.spec.hostNetwork"),
        ({}, {"head": pod(containers=None)}, f"{HEAD}.template.spec.containers"),
        ({}, {"submitter": pod(restartPolcy="Never")}, "spec.submitterPodTemplate.spec.restartPolcy"),
        ({}, {"gcs_fault_tolerance": {**REDIS, "driver_pod": {"spec": {"nodeSelektor": {}}}}},
         f"{CLUSTER}.workerGroupSpecs[1].template.spec.nodeSelektor"),
    ],
)  # fmt: skip
def test_a_setting_that_the_cluster_refuses_is_refused(
    resources: dict[str, Any], section: dict[str, Any], field: str
) -> None:
    with pytest.raises(SpecError) as caught:
        render(job(resources, **section))
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize(
    ("resources", "section"),
    [
        ({}, deletion(("FAILED", "DeleteWorkers", 0), ("FAILED", "DeleteCluster", 60),
                      ("FAILED", "DeleteSelf", 60), ("SUCCEEDED", "DeleteSelf", 0))),
        ({}, {"submission_mode": "SidecarMode", "head": pod(restartPolicy="Never")}),
        ({}, {"head": pod(restartPolicy="Always")}),
        ({}, {"head": env(SWITCH, "0")}),
        ({}, {"head": env("RAY_REDIS_ADDRESS"), "annotations": {"ray.io/ft-enabled": "true"}}),
        (ELASTIC, {**QUEUE, "annotations": {"kueue.x-k8s.io/elastic-job": "true"}}),
    ],
)  # fmt: skip
def test_a_setting_that_the_cluster_accepts_is_rendered(
    resources: dict[str, Any], section: dict[str, Any]
) -> None:
    assert [one["kind"] for one in render(job(resources, **section))] == ["ConfigMap", "RayJob"]


def test_all_problems_are_reported_at_once() -> None:
    section = {"cleanup": {"type": "keep"}, **QUEUE, "worker": pod(hostNetwrok=True)}
    with pytest.raises(SpecError) as caught:
        render(job(ELASTIC, **section))
    assert {problem.field for problem in caught.value.problems} == {
        f"{CLUSTER}.enableInTreeAutoscaling",
        "spec.shutdownAfterJobFinishes",
        f"{WORKERS}.template.spec.hostNetwrok",
    }


def test_a_null_in_a_pods_list_counts_as_absent() -> None:
    constraint = {
        "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "minDomains": None,
    }  # fmt: skip
    assert render(job(worker=pod(topologySpreadConstraints=[constraint])))


NONSENSE: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [1], [{}], {"a": 1}, 2**40]
PATCH: dict[str, Any] = {
    "metadata": {"labels": {"a": "b"}},
    "spec": {
        "restartPolicy": "Never",
        "containers": [{"name": "ray-head", "env": [{"name": "A", "value": "b"}]}],
    },
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(choice=st.randoms(use_true_random=False), value=st.sampled_from(NONSENSE))
def test_nonsense_in_a_pods_settings_is_never_a_crash(choice: Any, value: Any) -> None:
    patch = copy.deepcopy(PATCH)
    here: Any = patch
    key: Any = choice.choice(list(patch))
    while isinstance(here[key], dict | list) and here[key] and choice.random() < 0.85:
        here = here[key]
        key = choice.choice(list(here) if isinstance(here, dict) else range(len(here)))
    here[key] = value
    try:
        documents = render(job(ELASTIC, head={"pod": patch}))
    except SpecError:
        return
    assert documents[1]["kind"] == "RayJob"


# --- the command


def test_the_command_writes_manifests(tmp_path: Path) -> None:
    source = tmp_path / "job.yaml"
    source.write_text(
        "name: a\ntask: {type: causal_lm}\nmodel: {pretrained: org/m}\ndata: {train: not/here.jsonl}\n"
        "kubernetes: {image: r/o:1}\n",
        encoding="utf-8",
    )
    command = ["render", str(source), "--cluster", "8xH100x2", "--kueue", "gpus", "--spot",
               "--gcs-ft", "redis://redis:6379", "--set", "name=b"]  # fmt: skip
    written = CliRunner().invoke(app, command)
    assert written.exit_code == 0, written.output
    documents = list(yaml.safe_load_all(written.output))
    assert [one["kind"] for one in documents] == ["ConfigMap", "RayJob"]
    assert [one["metadata"]["name"] for one in documents] == ["b-job", "b"]
    comments = [line for line in written.output.splitlines() if line.startswith("# ")]
    assert {line[2:].partition(":")[0] for line in comments} >= {"num_workers", "pods"}


# --- the operator's own schemas


def operator_schema(kind: str) -> dict[str, Any]:
    """Return the schema that the operator installs; skip the test where the files are missing."""
    file = OPERATOR_SCHEMAS / f"{KINDS[kind][1]}.v1.json"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not in {OPERATOR_SCHEMAS}")
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["openAPIV3Schema"]
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a CRD's schema as JSON Schema, closed where the API server would drop unknown fields."""
    out = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes") and k != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
        out.pop("anyOf", None)
    if "properties" in schema:
        out["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    # A field with a default is filled in before the API server validates.
    defaults = {k for k, v in schema.get("properties", {}).items() if "default" in v}
    if "required" in out:
        out["required"] = [name for name in out["required"] if name not in defaults]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = closed(schema[key])
    return out


@pytest.mark.parametrize("cluster_only", [False, True])
@pytest.mark.parametrize("section", [{}, EVERYTHING, {"submission_mode": "SidecarMode"},
                                     {"cleanup": {"type": "keep"}, "token_auth": False}])  # fmt: skip
def test_the_operators_schema_accepts_what_is_rendered(
    section: dict[str, Any], cluster_only: bool
) -> None:
    one = render(job(**section), cluster_only)[-1]
    validator = Draft202012Validator(closed(operator_schema(one["kind"])))
    assert [error.message for error in validator.iter_errors(one)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_our_models_agree_with_the_operators_schemas(kind: str) -> None:
    differences: list[str] = []
    compare(KINDS[kind][0].model_json_schema(by_alias=True), operator_schema(kind), differences)
    assert differences == []


OPEN = {"apiVersion", "kind", "template", "submitterPodTemplate", "metadata", "status", "headService", "env", "envFrom",
        "volumeMounts", "resources", "securityContext", "valueFrom", "egressRules", "ingressRules"}  # fmt: skip
"""Fields that tell kinds apart, and Kubernetes' core API, which its own schemas describe."""


def compare(ours: dict[str, Any], theirs: dict[str, Any], out: list[str]) -> None:
    """Compare names, types, enums and required fields of the fields that we write, level by level."""
    _compare(ours, theirs, ours.get("$defs", {}), "", out)


def _compare(
    ours: dict[str, Any], theirs: dict[str, Any], defs: dict[str, Any], at: str, out: list[str]
) -> None:
    ours = _resolved(ours, defs)
    if "properties" in theirs:
        mine, other = ours.get("properties", {}), theirs["properties"]
        out += [f"{at}.{n}: unknown to the operator" for n in mine if n not in other]
        needed = {n for n in theirs.get("required", ()) if "default" not in other[n]}
        # At the top Kubernetes itself requires apiVersion, kind and metadata.
        if at and not needed <= set(ours.get("required", ())):
            out.append(f"{at}: required {sorted(needed)} {ours.get('required')}")
        for name in set(mine) & set(other) - OPEN:
            _compare(mine[name], other[name], defs, f"{at}.{name}", out)
        return
    if theirs.get("type") == "array":
        _compare(ours.get("items", {}), theirs["items"], defs, f"{at}[]", out)
        return
    enum = theirs.get("enum")
    if enum is not None and not set(ours.get("enum", [ours.get("const")])) <= set(enum):
        out.append(f"{at}: {enum} {ours}")
    if theirs.get("type") and theirs["type"] != ours.get("type", theirs["type"]):
        out.append(f"{at}: type {theirs['type']} {ours.get('type')}")


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """Follow references, and take X for `X or null`."""
    if "$ref" in schema:
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return {**_resolved(defs[schema["$ref"].rsplit("/", 1)[1]], defs), **rest}
    options = [o for o in schema.get("anyOf", ()) if o != {"type": "null"}]
    if len(options) == 1:
        rest = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
        return {**_resolved(options[0], defs), **rest}
    return schema


def test_the_operators_schema_holds_no_rule_that_nobody_has_read() -> None:
    """CEL rules are no JSON Schema; a new one may have to be written into `kuberay`."""
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
