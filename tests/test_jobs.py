"""The job files that ship: each is a job, and each is explained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.errors import SpecError
from orchestrator.spec import load_spec

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_a_shipped_job_but_data_to_be_fetched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent.parent)
    problems = []
    try:
        assert load_spec(path, []).name == path.stem.replace("_", "-")
    except SpecError as error:
        problems = error.problems
    assert [p for p in problems if p.why not in ("no such file", "no such folder")] == []


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_editors_find_the_schema_of_a_shipped_job_and_accept_the_job(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
    schema = json.loads((path.parent / named).read_text(encoding="utf-8"))
    wrong = Draft202012Validator(schema).iter_errors(yaml.safe_load(text))
    assert [error.message for error in wrong] == []


def test_every_path_of_a_shipped_job_is_one_that_a_script_beside_it_makes() -> None:
    folder = JOBS[0].parent
    scripts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    made = set(re.findall(r'"(\w+)": fetch_', scripts)) | set(
        re.findall(r'DATA / "(\w+)"', scripts)
    )
    named = {
        (path.name, word)
        for path in JOBS
        for word in re.findall(r"^[^#\n]*\bjobs/data/(\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert len(named) >= len(JOBS)
    assert [pair for pair in sorted(named) if pair[1] not in made] == []


def test_every_shipped_job_says_what_it_teaches() -> None:
    table = (JOBS[0].parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in JOBS if f"`{path.name}`" not in table] == []
