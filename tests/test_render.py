"""Manifests: sized as the plan sizes, accepted by KubeRay, without secrets, whatever things are called."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import PlanError, SpecError
from orchestrator.kube.merge import merged
from orchestrator.kube.render import render
from orchestrator.kube.sizing import size_of
from orchestrator.kube.text import (
    MAX_RAYCLUSTER_NAME,
    MAX_RAYJOB_NAME,
    dump_documents,
    object_name,
)
from orchestrator.plan.resources import check_cpus, share_out
from orchestrator.spec import JobSpec, load_spec, parse_spec

GOLDEN = Path(__file__).parent / "golden"
BASE: dict[str, Any] = {
    "name": "chat",
    "task": {"type": "causal_lm"},
    "model": {"pretrained": "org/model"},
    "data": {"train": "s3://bucket/train.jsonl"},
}
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # the machine may be busy
IMAGE = "registry.example/orchestrator:0.1.0"


def job(
    resources: dict[str, Any] | None = None,
    runtime: dict[str, Any] | None = None,
    **kubernetes: Any,
) -> JobSpec:
    """A job for Kubernetes; keyword arguments are fields of `kubernetes`."""
    section = {"cluster": "8xH100x4", "image": IMAGE, **kubernetes}
    given = {"resources": resources or {}, "runtime": runtime or {}, "kubernetes": section}
    data = {**BASE, **given}
    return parse_spec(data, files="there")


def ray_job(spec: JobSpec) -> dict[str, Any]:
    """The RayJob among the manifests."""
    return next(one for one in render(spec) if one["kind"] == "RayJob")


def worker_group(spec: JobSpec) -> dict[str, Any]:
    """The group of worker pods."""
    groups = ray_job(spec)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert len(groups) == 1
    return groups[0]


def containers(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every container in some manifests."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(value.get("containers", ()))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(documents)
    return found


# --- golden files


EVERYTHING = {
    "namespace": "training", "service_account": "trainer", "priority_class": "high",
    "image_pull_secrets": ["registry"], "labels": {"team": "nlp"},
    "secret_env": {"HF_TOKEN": {"secret": "hub", "key": "token"}},
    "storage": {"claim": "shared", "mount_path": "/mnt/shared"},
    "s3": {"secret": "s3-keys", "endpoint_url": "https://minio.storage:9000", "region": "eu-1"},
    "gcs_fault_tolerance": {
        "redis": "redis://redis:6379", "password": {"secret": "redis", "key": "password"},
    },
    "kueue": {"queue": "gpus", "priority_class": "urgent"},
    "active_deadline_s": 86400, "pre_running_deadline_s": 3600, "backoff_limit": 2,
    "head": {"cpus": 8, "memory_gib": 64, "node_selector": {"pool": "cpu"}},
    "worker": {"spot": True, "tolerations": [{"key": "team", "operator": "Equal", "value": "nlp"}]},
    "submitter": {"pod": {"metadata": {"annotations": {"sidecar.istio.io/inject": "false"}}}},
}  # fmt: skip
RULES = {
    "cleanup": {"type": "rules", "rules": [
        {"on": "SUCCEEDED", "policy": "DeleteCluster", "after_s": 60},
        {"on": "FAILED", "policy": "DeleteWorkers", "after_s": 60},
        {"on": "FAILED", "policy": "DeleteSelf", "after_s": 86400},
    ]},
    "submission_mode": "HTTPMode",
    "head": {"pod": {"spec": {"containers": [
        {"name": "ray-head", "env": [{"name": "RAY_health_check_period_ms", "value": "1000"}]}]}}},
    "gcs_fault_tolerance": {
        "redis": "redis://redis:6379",
        "driver_pod": {"spec": {"priorityClassName": "drivers"}},
    },
}  # fmt: skip
RUNTIME = {
    "env_vars": {"NCCL_DEBUG": "WARN"}, "secrets": ["HF_TOKEN"], "pip": ["sacrebleu==2.5.1"],
    "pip_options": ["--no-deps"],
}  # fmt: skip
CASES: dict[str, tuple[JobSpec, bool]] = {
    "rayjob-gpu": (job(), False),
    "rayjob-everything": (job({"num_workers": 12}, RUNTIME, **EVERYTHING), False),
    "rayjob-rules": (job({"num_workers": 8}, **RULES), False),
    "rayjob-elastic": (job({"num_workers": {"min": 8, "max": 32}}, idle_timeout_s=120), False),
    "raycluster-cpu": (job(cluster="16cpux2", head={"cpus": 2, "memory_gib": 8}), True),
}


@pytest.mark.parametrize("name", CASES)
def test_manifests_are_as_they_were_reviewed(name: str) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 python -m pytest tests/test_render.py, and read the diff."""
    spec, cluster_only = CASES[name]
    text = dump_documents(render(spec, cluster_only)).replace(_ray_version(), "RAY_VERSION")
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def _ray_version() -> str:
    from importlib.metadata import version

    return version("ray")


# --- size


@pytest.mark.parametrize(
    ("cluster", "resources", "pods", "per_pod", "gpus"),
    [
        ("8xH100x4", {}, 4, 8, 8),
        ("8xH100x4", {"num_workers": 12}, 2, 6, 6),
        ("8xH100x4", {"num_workers": 1}, 1, 1, 1),
        ("8xH100x1", {"gpus_per_worker": 0.5}, 1, 16, 8),
        ("8xH100x1", {"gpus_per_worker": 0.7}, 1, 8, 8),
        ("16cpux2", {}, 2, 1, 0),
        ("16cpux2", {"num_workers": 5}, 2, 3, 0),
        ("8xH100x2", {"gpus_per_worker": 0, "num_workers": 4}, 2, 2, 0),
    ],
)
def test_pods_hold_the_workers_that_the_plan_counts(
    cluster: str, resources: dict[str, Any], pods: int, per_pod: int, gpus: int
) -> None:
    spec = job(resources, cluster=cluster)
    size, group = size_of(spec), worker_group(spec)
    assert (size.max_pods, size.workers_per_pod, size.pod.gpus) == (pods, per_pod, gpus)
    assert [group[n] for n in ("replicas", "minReplicas", "maxReplicas")] == [pods] * 3
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) >= per_pod * size.workers.cpus
    assert limits.get("nvidia.com/gpu", "0") == str(gpus)


def test_a_range_of_workers_becomes_a_range_of_pods() -> None:
    group = worker_group(job({"num_workers": {"min": 9, "max": 32}}))
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)


@EXAMPLES
@given(
    gpus=st.sampled_from([0, 1, 2, 4, 8]),
    nodes=st.integers(1, 9),
    cpus=st.integers(4, 200),
    wanted=st.one_of(st.just("auto"), st.integers(1, 40)),
    share=st.sampled_from(["auto", 1.0, 0.5, 0.25, 0.1]),
    each=st.one_of(st.just("auto"), st.integers(1, 60)),
)
def test_a_live_plan_on_the_rendered_pods_finds_the_same_shares(
    gpus: int, nodes: int, cpus: int, wanted: int | str, share: float | str, each: int | str
) -> None:
    machines = f"{gpus}xH100x{nodes}:cpus={cpus}" if gpus else f"{cpus}cpux{nodes}"
    resources = {"num_workers": wanted, "cpus_per_worker": each}
    resources |= {"gpus_per_worker": share} if gpus else {}
    spec = job(resources, cluster=machines)
    try:
        size = size_of(spec)
    except PlanError:
        return
    assert size.pod.ray_memory_bytes > 0
    assert size.pod.cpus >= size.workers_per_pod * size.workers.cpus
    seen = share_out(spec, size.cluster, {})
    check_cpus(seen, size.cluster)
    if wanted == "auto" and gpus:  # as many as there are, and the pods are what there is
        assert seen.count == size.workers.count
    fixed = job({**resources, "num_workers": size.workers.count}, cluster=machines)
    assert share_out(fixed, size.cluster, {}) == size.workers


@pytest.mark.parametrize(
    ("cluster", "least", "most", "pods"),
    [("8xH100x4", 8, 32, (1, 4)), ("8xH100x4", 9, 16, (2, 2)), ("8xH100x4", 1, 64, (1, 4)),
     ("16cpux3", 1, 3, (1, 3))],
)  # fmt: skip
def test_an_elastic_range_is_the_autoscalers_range(
    cluster: str, least: int, most: int, pods: tuple[int, int]
) -> None:
    spec = job({"num_workers": {"min": least, "max": most}}, cluster=cluster)
    inner, group = ray_job(spec)["spec"]["rayClusterSpec"], worker_group(spec)
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (*pods, pods[1])
    assert ("enableInTreeAutoscaling" in inner) == (pods[0] < pods[1])
    if pods[0] < pods[1]:
        assert inner["autoscalerOptions"]["version"] == "v2"
        assert "automountServiceAccountToken" not in inner["headGroupSpec"]["template"]["spec"]


def test_an_elastic_range_in_kueue_needs_kueues_own_word() -> None:
    elastic = {"num_workers": {"min": 8, "max": 32}}
    with pytest.raises(SpecError) as caught:
        render(job(elastic, kueue={"queue": "gpus"}))
    assert "kueue.x-k8s.io/elastic-job" in caught.value.problems[0].fix
    render(
        job(elastic, kueue={"queue": "gpus"}, annotations={"kueue.x-k8s.io/elastic-job": "true"})
    )


def test_a_machine_too_small_for_a_worker_is_refused_with_one_that_does() -> None:
    with pytest.raises(PlanError, match=r"machines of 3 CPUs") as caught:
        render(job(cluster="2cpux3"))
    found = re.search(r"machines of (\d+) CPUs", str(caught.value))
    assert found
    render(job(cluster=f"{found[1]}cpux3"))


def test_shared_memory_is_counted_once() -> None:
    group = worker_group(job())
    pod = group["template"]["spec"]
    limit = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi")) * 2**20
    shm = next(v for v in pod["volumes"] if v["name"] == "shm")["emptyDir"]
    params = {k: int(v) for k, v in group["rayStartParams"].items()}
    assert shm["medium"] == "Memory"
    assert params["object-store-memory"] <= int(shm["sizeLimit"].removesuffix("Mi")) * 2**20
    assert params["memory"] + int(shm["sizeLimit"].removesuffix("Mi")) * 2**20 <= limit + 2**20


# --- what a pod may and does


def test_no_container_runs_as_root_or_gains_rights() -> None:
    documents = render(job(**EVERYTHING))
    pods = yaml.safe_dump(documents)
    assert len(containers(documents)) == 4, "head, worker, driver, submitter"
    for container in containers(documents):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    assert pods.count("runAsNonRoot: true") == 4
    assert "runAsUser: 0" not in pods


def test_a_worker_pod_drains_its_node_and_has_the_time_for_it() -> None:
    pod = worker_group(job(drain_s=90))["template"]["spec"]
    assert hook(pod) == ["--deadline-s", "90"]
    assert pod["terminationGracePeriodSeconds"] > 90


def hook(pod: dict[str, Any]) -> list[str]:
    """The words of a pod's preStop hook, without the program's."""
    words: list[str] = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert words[:3] == ["python", "-m", "orchestrator.kube.drain"]
    return words[3:]


def test_where_the_head_may_be_lost_the_driver_and_its_job_are_elsewhere() -> None:
    redis = {"gcs_fault_tolerance": {"redis": "redis://redis:6379"}}
    lost, kept = (ray_job(job(drain_s=90, **k))["spec"] for k in (redis, {}))
    head, kept_head = (
        one["rayClusterSpec"]["headGroupSpec"]["template"]["spec"] for one in (lost, kept)
    )
    group = lost["rayClusterSpec"]["workerGroupSpecs"][1]
    driver, params = group["template"]["spec"], group["rayStartParams"]
    assert [group[n] for n in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 1]
    given = shlex.split(f"ray start --resources={params['resources']}")[-1]  # as KubeRay writes it
    assert given == '--resources={"driver": 100}'
    assert lost["entrypointResources"] == '{"driver": 1}'
    assert params["num-cpus"] == "0", "no worker lies on it"
    assert "entrypointResources" not in kept
    jobs = [[v["name"] for v in pod["volumes"]].count("job") for pod in (head, driver, kept_head)]
    assert jobs == [0, 1, 1]
    hooks = [hook(pod) for pod in (head, driver, kept_head)]
    assert hooks == [["--deadline-s", "90", role] for role in ("--head", "--driver", "--head")]
    assert all(pod["terminationGracePeriodSeconds"] > 90 for pod in (head, driver))
    plan = size_of(job(drain_s=90, **redis))
    assert plan.cluster == size_of(job()).cluster, "the workers' pods are what they were"


def test_spot_is_for_workers_only() -> None:
    cluster = ray_job(job(worker={"spot": True}))["spec"]["rayClusterSpec"]
    assert "spot" in yaml.safe_dump(cluster["workerGroupSpecs"])
    assert "spot" not in yaml.safe_dump(cluster["headGroupSpec"])


def test_the_entrypoint_is_the_command_a_person_would_type() -> None:
    entrypoint = ray_job(job(storage={"mount_path": "/mnt/x.y"}))["spec"]["entrypoint"]
    assert shlex.split(entrypoint) == [
        "env", "--chdir=/mnt/x.y", "python", "-m", "orchestrator", "train", "/etc/orchestrator/job.yaml",
    ]  # fmt: skip


def test_a_sweep_is_run_as_one_and_gets_all_machines() -> None:
    section = {"cluster": "8xH100x4", "image": IMAGE}
    data = {**BASE, "resources": {"num_workers": 2}, "kubernetes": section}
    data["data"] = {"train": "s3://b/train.jsonl", "eval": "s3://b/eval.jsonl"}
    data["sweep"] = {"space": {"optimizer.lr": [1e-4, 1e-5]}}
    spec = parse_spec(data, files="there")
    assert shlex.split(ray_job(spec)["spec"]["entrypoint"])[-2:] == [
        "sweep", "/etc/orchestrator/job.yaml",
    ]  # fmt: skip
    assert (worker_group(spec)["replicas"], size_of(spec).pod.gpus) == (4, 8)


def test_the_job_in_the_manifest_reads_back_as_the_job(tmp_path: Path) -> None:
    spec = job(**EVERYTHING)
    config = next(one for one in render(spec) if one["kind"] == "ConfigMap")
    file = tmp_path / "job.yaml"
    file.write_text(config["data"]["job.yaml"], encoding="utf-8")
    assert load_spec(file, files="there") == spec


@pytest.mark.parametrize("name", ["path; rm -rf /", "$(id)", "a b", "../x", "/a/../b", "/", "x"])
def test_paths_that_a_shell_could_misread_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="mount_path"):
        job(storage={"mount_path": name})


def as_kubernetes_reads(value: str, known: dict[str, str]) -> str:
    """A variable's value after Kubernetes' expansion: `$$` is `$`, `$(NAME)` a reference."""
    return re.sub(
        r"\$(\$|\(([^)]*)\)|(?=.)|$)",
        lambda m: "$" if m[1] in ("", "$") else known.get(m[2], m[0]),
        value,
    )


@EXAMPLES
@example(value="$(PATH) $$ $$(a) $x $")
@given(value=st.text(alphabet="$()aPATH{}'\"`;\\ \n", max_size=12))
def test_a_variable_arrives_in_the_pod_as_it_was_written(value: str) -> None:
    spec = job(runtime={"env_vars": {"X": value}})
    variables = worker_group(spec)["template"]["spec"]["containers"][0]["env"]
    written = next(one["value"] for one in variables if one["name"] == "X")
    assert as_kubernetes_reads(written, {"PATH": "!", "a": "!"}) == value


# --- overrides


def test_any_field_of_a_pod_can_be_set_from_the_job() -> None:
    patch = {
        "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
        "spec": {
            "hostNetwork": True,
            "terminationGracePeriodSeconds": None,
            "containers": [
                {"name": "ray-worker", "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]},
                {"name": "logs", "image": "fluent-bit:3"},
            ],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        },
    }
    before = worker_group(job())["template"]
    after = worker_group(job(worker={"pod": patch}))["template"]
    assert after["spec"]["hostNetwork"] is True
    assert "terminationGracePeriodSeconds" not in after["spec"]
    assert after["metadata"]["labels"] == before["metadata"]["labels"]
    assert [c["name"] for c in after["spec"]["containers"]] == ["ray-worker", "logs"]
    names = [one["name"] for one in after["spec"]["containers"][0]["env"]]
    assert names == ["HF_HOME", "PYTHONUNBUFFERED", "NCCL_IB_HCA"]
    assert [v["name"] for v in after["spec"]["volumes"]] == ["storage", "shm", "scratch"]


def test_an_override_that_kubernetes_refuses_is_refused_here() -> None:
    with pytest.raises(SpecError) as caught:
        render(job(worker={"pod": {"spec": {"hostNetwrok": True}}}))
    (problem,) = caught.value.problems
    assert problem.field.endswith("workerGroupSpecs[0].template.spec.hostNetwrok")
    assert "'hostNetwork'" in problem.fix


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    base=st.dictionaries(st.text(max_size=2), JSON),
    patch=st.dictionaries(st.text(max_size=2), JSON),
)
def test_a_patch_wins_where_it_speaks_and_only_there(
    base: dict[str, Any], patch: dict[str, Any]
) -> None:
    result = merged(base, patch)
    assert set(result) == (set(base) | set(patch)) - {k for k, v in patch.items() if v is None}
    for key, value in base.items():
        if key not in patch:
            assert result[key] == value
    assert merged(result, patch) == result


# --- names and YAML


@EXAMPLES
@given(name=st.from_regex(r"\A[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?\Z"))
@pytest.mark.parametrize("limit", [MAX_RAYJOB_NAME, MAX_RAYCLUSTER_NAME])
def test_every_run_name_becomes_a_name_kubernetes_takes(name: str, limit: int) -> None:
    label = object_name(name, limit)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label)
    assert len(label) <= limit
    assert label == name or label.endswith(tuple("0123456789abcdef"))


def test_names_that_differ_stay_apart() -> None:
    names = ["a.b", "a_b", "a-b", "1a", "a" * 60, "a" * 61, "1", "0"]
    assert len({object_name(name, MAX_RAYJOB_NAME) for name in names}) == len(names)


TEXT = st.one_of(
    st.text(),
    st.sampled_from(
        ["1e3", "0o7", "0x1f", "1_000", ".5", "~", "y", "No", "on", "null", "12:30", "2026-01-01", "- a",
         "a: b", "#x", "{{ x }}", "*a", "&b", "!c", "%d", "@e", "`", "'", '"', "a\n---\nb: c\n", " x ",
         "\x85", "\u2028", "=", "<<", "+1", "-", "?", "|", ">"]
    ),
)  # fmt: skip
YAML_1_2_PLAIN = re.compile(r"[A-Za-z/]")


@EXAMPLES
@given(value=TEXT, key=TEXT)
def test_text_stays_text_in_every_reader(value: str, key: str) -> None:
    text = dump_documents([{"a": {key: value}}])
    assert yaml.safe_load(text) == {"a": {key: value}}
    scalar = next(e for e in reversed(list(yaml.parse(text))) if isinstance(e, yaml.ScalarEvent))
    if scalar.style is None:  # unquoted: nothing that could be a number, a truth value or nothing
        assert YAML_1_2_PLAIN.match(scalar.value)
        assert scalar.value.lower() not in (
            "y",
            "n",
            "yes",
            "no",
            "on",
            "off",
            "true",
            "false",
            "null",
        )


# --- secrets


PLANTED = "s3cr3t-PLANTED-7f1"


def test_a_secret_of_this_environment_never_enters_a_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, PLANTED)
    text = dump_documents(render(job(**EVERYTHING)))
    assert PLANTED not in text
    assert "secretKeyRef" in text


@pytest.mark.parametrize(
    "kubernetes",
    [
        {"runtime": {"env_vars": {"HF_TOKEN": PLANTED}}},
        {"runtime": {"env_vars": {"WANDB_API_KEY": PLANTED}}},
        {"runtime": {"env_vars": {"BROKER": f"amqp://user:{PLANTED}@broker"}}},
        {"runtime": {"pip": [f"x @ https://me:{PLANTED}@host/x.whl"]}},
        {"annotations": {"note": f"https://me:{PLANTED}@host/x"}},
        {"worker": {"pod": {"spec": {"containers": [
            {"name": "ray-worker", "env": [{"name": "DB_PASSWORD", "value": PLANTED}]}]}}}},
        {"gcs_fault_tolerance": {"redis": f"redis://:{PLANTED}@redis:6379"}},
        {"s3": {"endpoint_url": f"https://key:{PLANTED}@minio:9000"}},
    ],
)  # fmt: skip
def test_a_secret_written_into_a_job_is_refused_and_not_repeated(
    kubernetes: dict[str, Any],
) -> None:
    with pytest.raises(SpecError) as caught:
        job(**kubernetes)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        {"data": {"train": f"sftp://user:{PLANTED}@host/x.jsonl"}},
        {"data": {"train": ["a.jsonl", f"s3://KEY:with/slashes/{PLANTED}@bucket/x.jsonl"]}},
        {"model": {"pretrained": f"https://user:{PLANTED}@host/a/model"}},
        {"tracking": {"mlflow": f"https://user:{PLANTED}@host"}},
    ],
)
def test_a_password_in_a_url_is_refused_by_every_verb(field: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="holds a URL with a password") as caught:
        parse_spec({**BASE, **field})
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("package", ["x @ git+https://host:8080/x@v1", "x @ https://host/x.whl"])
def test_a_url_without_a_password_is_taken_for_none(package: str) -> None:
    assert job(runtime={"pip": [package]}).runtime.pip == (package,)


# --- what is missing


RESERVED: dict[str, Any] = {
    "driver_cpus": 1,
    "driver_memory_gib": 4,
    "driver_resources": {"big": 1},
}


def test_what_rendering_needs_is_said_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        render(parse_spec(BASE, files="there"))
    assert [p.field for p in caught.value.problems] == ["kubernetes.cluster", "kubernetes.image"]
    with pytest.raises(SpecError) as caught:
        render(job(runtime={"secrets": ["HF_TOKEN"], **RESERVED}))
    assert [p.field for p in caught.value.problems] == [
        "kubernetes.secret_env.HF_TOKEN", *(f"runtime.{name}" for name in RESERVED),
    ]  # fmt: skip


def test_a_cluster_for_jobs_that_reserve_something_for_their_driver_is_rendered() -> None:
    assert render(job(runtime=RESERVED), cluster_only=True)
