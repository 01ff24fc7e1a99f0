"""A submitted job with packages of its own: driver and workers run where they were installed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from head import LocalHead
from pods import until
from test_jobs_api import Shell

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

INSTALL_S = 450
"""Ray copies the whole environment that it runs in, where that is a virtual one, and installs into the copy."""
NOTE_OF_PROCESS = """
import os, pathlib
folder = os.environ.get("PLANTED_NOTES")
if folder:
    pathlib.Path(folder, str(os.getpid())).touch()
"""


def write_wheel(folder: Path) -> Path:
    """A package of one module that every Python process of its environment imports as it starts."""
    folder.mkdir(parents=True)
    wheel = folder / "planted-1.0-py3-none-any.whl"
    info = "planted-1.0.dist-info"
    files = {
        "planted.py": NOTE_OF_PROCESS,
        "planted.pth": "import planted\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    names = [*files, f"{info}/RECORD"]
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in names)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return folder


@pytest.fixture
def head() -> Iterator[LocalHead]:
    one = LocalHead()
    yield one
    one.close()


def test_packages_of_a_job_are_there_in_its_driver_and_in_its_workers(
    head: LocalHead, models: tiny.Tiny, tmp_path: Path
) -> None:
    here, notes = tmp_path / "here", tmp_path / "notes"
    wheels = write_wheel(tmp_path / "wheels")
    notes.mkdir()
    job = {
        "name": "packed",
        "task": {"type": "text_classification"},
        "model": {"pretrained": str(models.bert)},
        "data": {
            "train": str(tiny.write_jsonl(here / "train.jsonl", tiny.labeled(64))),
            "prepared_dir": str(tmp_path / "prepared"),
        },
        "batch": {"global_batch_size": 16},
        "stop": {"max_steps": 5000},
        "checkpoint": {"every_steps": 5000},
        "resources": {"num_workers": 2, "cpus_per_worker": 1},
        "storage_path": str(tmp_path / "runs"),
        "runtime": {
            "pip": ["planted"],
            "pip_options": ["--no-index", f"--find-links={wheels}"],
            "env_vars": {"PLANTED_NOTES": str(notes)},
        },
    }
    (here / "job.yaml").write_text(yaml.safe_dump(job))
    shell = Shell(head, here)
    name = shell.submit()
    steps = tmp_path / "runs" / "packed" / "metrics" / "steps.jsonl"

    def began_or_failed() -> bool:
        return steps.exists() or "FAILED" in shell.run("status", name)[1]

    until(began_or_failed, "the first step", INSTALL_S)
    assert steps.exists(), shell.run("status", name)[1]

    noted = {int(note.name) for note in notes.iterdir()}
    workers = {p.pid for p in head.processes("RayTrainWorker")}
    assert len(workers) == 2
    assert workers <= noted, "the workers do not see the package"
    (driver,) = head.processes("-m orchestrator train job.yaml")[-1:]
    assert driver.pid in noted, "the driver does not see the package"
    status, out = shell.run("stop", name)
    assert (status, out.strip()) == (0, f"{name}: STOPPED")
