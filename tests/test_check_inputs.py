"""`check` answers any file with a list of problems, never with a traceback."""

from __future__ import annotations

import copy
import os
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.spec import JobSpec, apply_overrides, dump_spec, load_spec, parse_spec
from orchestrator.spec.paths import local_files, plain_path

BASE: dict[str, Any] = {
    "name": "job",
    "task": {"type": "text_classification"},
    "model": {"pretrained": "org/model"},
    "data": {"train": "memory://rows.jsonl"},
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def fields(error: SpecError) -> set[str]:
    assert str(error)
    return {problem.field for problem in error.problems}


JOB = yaml.safe_dump(BASE)
HOSTILE = {
    "bad date": JOB + "seed: 2020-13-45\n",
    "date": JOB + "seed: 2020-01-02\n",
    "date in a config": JOB + "tracking: {project: 2020-01-02}\n",
    "binary": JOB + "storage_path: !!binary aGVsbG8=\n",
    "bad binary": JOB + "storage_path: !!binary '*'\n",
    "long integer": JOB + f"seed: {'9' * 5000}\n",
    "long hexadecimal": JOB + f"seed: 0x{'f' * 8000}\n",
    "deep nesting": "a: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(3000)),
    "recursive list": JOB + "tracking: &a [*a]\n",
    "recursive mapping": "&a\nname: *a\n",
    "exploding aliases": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in pairwise("abcdefgh")),
    "set": JOB + "tracking: !!set {a, b}\n",
    "object tag": "!!python/object/apply:os.system ['true']",
    "unknown tag": JOB + "seed: !secret x\n",
    "empty": "",
    "only a comment": "# nothing\n",
    "a list": "- a\n",
    "tabs": "name:\n\tx: 1\n",
    "two documents": JOB + "---\n" + JOB,
    "number as key": JOB + "1: x\n",
    "null as key": JOB + "null: x\n",
    "date as key": JOB + "2020-01-02: x\n",
    "list as key": "? [a, b]\n: x\n",
    "data is a list": JOB.replace("data:\n  train: memory://rows.jsonl", "data: [a]"),
    "data is null": JOB.replace("data:\n  train: memory://rows.jsonl", "data:"),
    "empty space": JOB + "sweep: {space: {optimizer.lr: []}}\n",
    "NUL in a path": JOB + 'storage_path: "a\\0b"\n',
    "NUL in rows": JOB.replace("memory://rows.jsonl", '"a\\0b"'),
    "NUL in a model": JOB.replace("org/model", '"./a\\0b"'),
    "long path": JOB.replace("memory://rows.jsonl", "x/" + "a" * 5000),
    "long folder": JOB.replace("org/model", "./" + "a" * 5000),
    "surrogate": JOB + 'storage_path: "\\ud800"\n',
    "not UTF-8": b"name: caf\xe9\n",
    "UTF-16": JOB.encode("utf-16"),
    "NUL": b"name: a\0b\n",
    "unclosed": "name: 'a\n",
    "merge of a text": "<<: abc\n",
    "undefined alias": "name: *nobody\n",
    "unknown scheme": JOB.replace("memory://", "s4://"),
    "bracket": JOB.replace("memory://rows.jsonl", "'rows[.jsonl'"),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_job_file_is_a_list_of_problems(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path / "job.yaml", text))
    assert fields(caught.value)


@pytest.mark.parametrize("path", [".", "no/such.yaml", "a\0b", "~nobody/x.yaml"])
def test_a_job_file_that_cannot_be_read_is_a_problem(path: str) -> None:
    with pytest.raises(SpecError):
        load_spec(path)


@pytest.mark.parametrize(
    "override", ["seed=2020-13-45", "seed=*a", "seed=[", "x", "=1", "seed=!!binary '*'"]
)
def test_a_hostile_override_is_a_problem(override: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(apply_overrides(BASE, [override]))


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    | st.binary(max_size=4) | st.sampled_from(["auto", "lora", "s3://b/x", "~", "\0", "*", "[", "type"])
)  # fmt: skip
NAMES = st.sampled_from([*JobSpec.model_fields, "type", "train", "eval", "space", "optimizer.lr"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | SCALARS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(NAMES, VALUES, max_size=3), inside=st.booleans())
def test_random_values_in_a_job_are_a_job_or_a_list_of_problems(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], inside: bool
) -> None:
    job = copy.deepcopy(BASE)
    for name, value in changes.items():
        section = job.get(name)
        if inside and isinstance(section, dict) and isinstance(value, dict):
            section.update(value)
        else:
            job[name] = value
    path = tmp_path_factory.mktemp("fuzz") / "job.yaml"
    path.write_text(yaml.dump(job, allow_unicode=False), encoding="utf-8")
    with suppress(SpecError):
        assert dump_spec(load_spec(path))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!#|>'\"\n\t ,?%0\x00é")), max_size=40))
def test_random_text_is_a_job_or_a_list_of_problems(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "job.yaml"
    with pytest.raises(SpecError) as caught:
        load_spec(write(path, text))
    assert fields(caught.value)


# --- paths and URLs


def test_home_folder_file_urls_and_s3a_are_written_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert plain_path("~/rows.csv") == "/home/me/rows.csv"
    assert plain_path("~") == "/home/me"
    assert plain_path("a~b") == "a~b"
    assert plain_path("file:///tmp/a%20b.csv") == "/tmp/a b.csv"
    assert plain_path("s3a://bucket/x") == plain_path("s3n://bucket/x") == "s3://bucket/x"


def test_every_path_of_a_job_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_csv(tmp_path / "train.csv", tiny.labeled(2))
    (tmp_path / "model").mkdir()
    job = {
        **BASE,
        "model": {"pretrained": "~/model", "tokenizer": "~/model"},
        "data": {"train": ["~/train.csv"], "eval": "~/train.csv", "prepared_dir": "~/prepared"},
        "storage_path": "~/runs",
    }
    spec = parse_spec(job)
    home = str(tmp_path)
    assert spec.data.train == (f"{home}/train.csv",)
    assert spec.data.eval == f"{home}/train.csv"
    assert (spec.storage_path, spec.data.prepared_dir) == (f"{home}/runs", f"{home}/prepared")
    assert (spec.model.pretrained, spec.model.tokenizer) == (f"{home}/model", f"{home}/model")


@pytest.mark.parametrize("field", ["storage_path", "data.prepared_dir"])
@pytest.mark.parametrize("value", ["s3://bucket/runs", "s3:/bucket/runs", "gs://b", "hdfs://h/x"])
def test_a_url_is_no_folder(field: str, value: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(apply_overrides(BASE, [f"{field}={value}"]))
    assert fields(caught.value) == {field}


@pytest.mark.parametrize("url", ["foo://x/y.csv", "s4://b/x.csv", "s3:/b/x.csv", "S5://b/x.csv"])
def test_an_unknown_scheme_is_refused_before_anything_runs(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(apply_overrides(BASE, [f"data.train={url}"]))
    assert fields(caught.value) == {"data.train"}


def test_a_package_that_a_scheme_needs_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(apply_overrides(BASE, ["data.train=az://container/rows.csv"]))
    assert "adlfs" in str(caught.value)


def test_globs_skip_hidden_files_and_a_literal_name_wins(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", ".hidden.csv", "rows[1].csv", "rows1.csv"):
        (tmp_path / name).write_text("text,label\n")
    (tmp_path / "folder.csv").mkdir()
    found = local_files(str(tmp_path / "*.csv"))
    assert [os.path.basename(p) for p in found] == ["a.csv", "b.csv", "rows1.csv", "rows[1].csv"]
    literal = str(tmp_path / "rows[1].csv")
    assert local_files(literal) == [literal]


def test_folders_that_exist_are_no_part_of_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    (folder / "deep [x]").mkdir(parents=True)
    for path in (folder / "a.csv", folder / "deep [x]" / "b.csv"):
        path.write_text("text,label\n")
    assert local_files(f"{folder}/*.csv") == [f"{folder}/a.csv"]
    assert local_files(f"{folder}/**/*.csv") == [f"{folder}/a.csv", f"{folder}/deep [x]/b.csv"]
    assert local_files(f"{tmp_path}/run*/[ab].csv") == [f"{folder}/a.csv"]


@pytest.mark.parametrize("name", ["a folder", "x#y", "50%", "größe", "日本", "{a,b}"])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    path = tiny.write_csv(tmp_path / name / f"{name}.csv", tiny.labeled(2))
    assert local_files(str(path)) == [str(path)]


def test_a_folder_in_place_of_its_files_says_which_glob_names_them(tmp_path: Path) -> None:
    tiny.write_parquet(tmp_path / "rows" / "a.parquet", tiny.labeled(2))
    with pytest.raises(SpecError) as caught:
        parse_spec({**BASE, "data": {"train": str(tmp_path / "rows")}})
    assert f"{tmp_path}/rows/*.parquet" in str(caught.value)


def test_paths_on_the_command_line_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text(JOB)
    runner = CliRunner()
    assert runner.invoke(app, ["check", "~/job.yaml"]).exit_code == 0
    for arguments in (["report", "~/none"], ["report", "none", "--storage-path=~/runs"]):
        with pytest.raises(OrchestratorError, match=re.escape(str(tmp_path))):
            runner.invoke(app, arguments, catch_exceptions=False)
