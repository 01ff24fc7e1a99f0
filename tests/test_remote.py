"""Test the package, the request and the token that are sent to a cluster, without Ray."""

from __future__ import annotations

import os
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import OrchestratorError, PlanError, SpecError
from orchestrator.plan import describe_cluster
from orchestrator.remote import package
from orchestrator.remote.head import RemoteError, find_token, http_address, last_error
from orchestrator.remote.jobs import exit_code
from orchestrator.remote.request import check_capacity, check_driver_resources, job_in, make_request
from orchestrator.spec import JobSpec, load_spec, parse_spec

KEPT = {"storage_path": "/shared/runs"}


def spec(**fields: Any) -> JobSpec:
    """Return a job that can be submitted. Its files are on the cluster."""
    data = {"train": "/cluster/train.jsonl", "prepared_dir": "/shared/prepared"}
    given = {
        "name": "job",
        "task": {"type": "text_classification"},
        "model": {"pretrained": "org/model"},
        **KEPT,
        **fields,
    }
    return parse_spec({**given, "data": {**data, **fields.get("data", {})}}, files="packed")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with code, data, a repository and ignore files."""
    for name in (
        "job.yaml", "code/train.py", "code/__pycache__/train.pyc", ".git/HEAD", "data/train.jsonl",
        "data/huge.bin", "models/bert/config.json", "models/bert/model.safetensors", "models/other/x",
        "notes/draft.txt", "notes/kept.txt", "scratch/a.tmp",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("data/\nmodels/\n")
    (tmp_path / ".rayignore").write_text("*.tmp\n")
    (tmp_path / "notes" / ".gitignore").write_text("draft.txt\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_job_names_is_packed_and_what_is_ignored_stays_at_home(here: Path) -> None:
    job = spec(data={"train": "data/*.jsonl"}, model={"pretrained": "models/bert"})
    packed = {f.as_posix() for f in package.files_to_pack(here, job, Path("job.yaml"))}
    assert packed == {
        ".gitignore", ".rayignore", "notes/.gitignore", "job.yaml", "code/train.py", "data/train.jsonl",
        "models/bert/config.json", "models/bert/model.safetensors", "notes/kept.txt",
    }  # fmt: skip


def test_a_path_that_leaves_the_working_directory_is_refused_not_left_behind(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray unpacks nothing outside the job's folder, and says so only in a log of its own."""
    monkeypatch.chdir(here / "code")
    away = {"data": {"train": "../data/*.jsonl"}, "model": {"pretrained": "../models/bert"}}
    with pytest.raises(SpecError) as caught:
        spec(**away)
    assert [p.field for p in caught.value.problems] == ["data.train", "model.pretrained"]
    assert str(caught.value).count("leaves the working directory") == 2
    monkeypatch.chdir(here)
    winding = spec(data={"train": "code/../data/*.jsonl"}, model={"pretrained": "./models/bert"})
    packed = {f.as_posix() for f in package.files_to_pack(here, winding, Path("job.yaml"))}
    assert {"data/train.jsonl", "models/bert/config.json"} <= packed


def test_excludes_of_the_job_hold_too_but_not_for_what_it_names(here: Path) -> None:
    job = spec(runtime={"excludes": ["notes", "job.yaml", "code/*.py"]})
    packed = {f.as_posix() for f in package.files_to_pack(here, job, Path("job.yaml"))}
    assert packed == {".gitignore", ".rayignore", "job.yaml"}


def test_unchanged_files_make_an_unchanged_package(here: Path) -> None:
    files = package.files_to_pack(here, spec(), Path("job.yaml"))
    first = package.pack(here, files, here / "a.zip").read_bytes()
    (here / "code" / "train.py").touch()
    assert package.pack(here, files, here / "b.zip").read_bytes() == first
    with zipfile.ZipFile(here / "a.zip") as archive:
        assert archive.read("code/train.py") == b"code/train.py"


def test_a_package_that_is_too_large_names_its_largest_files(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT_BYTES", 2000)
    (here / "code" / "noise.bin").write_bytes(os.urandom(4000))
    files = package.files_to_pack(here, spec(), Path("job.yaml"))
    with pytest.raises(OrchestratorError, match=r"code/noise\.bin"):
        package.pack(here, files, here / "a.zip")
    monkeypatch.setattr(package, "MAX_INPUT_BYTES", 1000)
    (here / "a.zip").unlink()
    with pytest.raises(OrchestratorError, match=r"code/noise.bin"):
        package.pack(here, files, here / "a.zip")
    assert not (here / "a.zip").exists(), "no large input is compressed"


def test_no_word_of_a_job_reaches_the_shell_unquoted() -> None:
    hostile = [
        "name=x; rm -rf /",
        "data.train=$(id)",
        "storage_path=`id`",
        "model.pretrained='a' && b",
    ]
    request = make_request(spec(), Path("my jobs/a;b.yaml"), hostile, "x.zip")
    words = shlex.split(request.entrypoint)
    assert words == ["python", "-m", "orchestrator", "train", "my jobs/a;b.yaml", *hostile]
    assert shlex.quote(hostile[1]) in request.entrypoint


@pytest.mark.parametrize("name", ["a/b", "two words", "-x", "a;b"])
def test_a_name_that_no_url_can_hold_is_refused(name: str) -> None:
    with pytest.raises(OrchestratorError, match=r"--name"):
        make_request(spec(), Path("job.yaml"), [], ".", name)


def test_the_job_gets_time_to_commit_and_its_own_environment() -> None:
    runtime = {
        "pip": ["sacrebleu==2.5"],
        "pip_options": ["--no-index"],
        "env_vars": {"HF_HUB_OFFLINE": "1"},
        "stop_wait_s": 300,
    }
    request = make_request(spec(runtime=runtime), Path("job.yaml"), [], "x.zip", "mine")
    assert request.submission_id == "mine"
    assert request.runtime_env == {
        "working_dir": "x.zip",
        "env_vars": {"HF_HUB_OFFLINE": "1", "RAY_JOB_STOP_WAIT_TIME_S": "300"},
        "pip": {"packages": ["sacrebleu==2.5"], "pip_install_options": ["--no-index"]},
    }
    ids = {make_request(spec(), Path("job.yaml"), [], "x.zip").submission_id for _ in range(3)}
    assert len(ids) == 3


def test_a_job_that_would_lose_its_run_or_show_a_secret_is_refused(here: Path) -> None:
    (here / "job.yaml").write_text(
        "name: job\ntask: {type: text_classification}\nmodel: {pretrained: org/model}\n"
        "data: {train: nowhere.jsonl}\nruntime: {env_vars: {HF_TOKEN: abc}, pip_options: [--pre]}\n"
    )
    with pytest.raises(SpecError) as caught:
        load_spec("job.yaml", files="packed")
    assert [p.field for p in caught.value.problems] == [
        "runtime.env_vars.HF_TOKEN", "runtime.pip_options", "data.train", "storage_path", "data.prepared_dir",
    ]  # fmt: skip
    assert "abc" not in str(caught.value)


def test_inside_a_job_s_own_folder_training_is_refused_unless_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("text,label\n")
    monkeypatch.chdir(folder)
    data = {"train": "train.csv", "prepared_dir": "/shared/prepared"}
    given = {"name": "j", "task": {"type": "causal_lm"}, "model": {"pretrained": "a/b"}}
    with pytest.raises(SpecError, match="Ray deletes when the job ends"):
        parse_spec({**given, "data": data})
    assert parse_spec({**given, "data": data, **KEPT}).storage_path == "/shared/runs"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "TOP_K", "MONKEY"])
def test_harmless_variables_are_not_taken_for_secrets(name: str) -> None:
    assert spec(runtime={"env_vars": {name: "1"}}).runtime.env_vars == {name: "1"}


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD"])
def test_secrets_are_taken_for_secrets(name: str) -> None:
    with pytest.raises(SpecError, match=r"runtime\.secrets"):
        spec(runtime={"env_vars": {name: "1"}})


def test_a_job_file_outside_the_working_directory_is_refused(here: Path) -> None:
    assert job_in(here, here / "code" / ".." / "job.yaml") == Path("job.yaml")
    with pytest.raises(SpecError) as caught:
        job_in(here / "code", here / "job.yaml")
    assert [p.field for p in caught.value.problems] == [str(here / "job.yaml")]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"resources": {"num_workers": 9}}, r"num_workers = 9 .* at most 8"),
        ({"runtime": {"driver_cpus": 5}}, r"runtime\.driver_cpus = 5"),
        ({"runtime": {"driver_memory_gib": 99}}, r"runtime\.driver_memory_gib = 99"),
        (
            {"resources": {"num_workers": 2, "cpus_per_worker": 4}, "runtime": {"driver_cpus": 1}},
            r"runtime\.driver_cpus = 1",
        ),
    ],
)
def test_a_request_that_can_never_be_met_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        check_capacity(spec(**fields), describe_cluster("4cpux2"))


def test_a_driver_s_resource_that_no_node_has_is_refused() -> None:
    nodes = [{"CPU": 4.0, "node:10.0.0.1": 1.0}, {"CPU": 0.0, "driver": 100.0, "memory": 2.0**30}]
    check_driver_resources(spec(), nodes)
    check_driver_resources(spec(runtime={"driver_resources": {"driver": 1}}), nodes)
    with pytest.raises(PlanError, match=r"runtime\.driver_resources = \{big: 1\}.*: driver\."):
        check_driver_resources(spec(runtime={"driver_resources": {"big": 1}}), nodes)


def test_driver_and_workers_have_to_find_places_on_nodes_not_just_enough_cpus() -> None:
    wanted = {"resources": {"num_workers": 2, "cpus_per_worker": 3}}
    for cpus, fits in ((1, True), (2, False)):
        job = spec(**wanted, runtime={"driver_cpus": cpus})
        if fits:
            check_capacity(job, describe_cluster("4cpux2"))
        else:
            with pytest.raises(PlanError, match=r"runtime\.driver_cpus = 2"):
                check_capacity(job, describe_cluster("4cpux2"))


def test_a_plan_is_for_one_cluster() -> None:
    words = ["plan", "job.yaml", "--cluster", "4cpux1", "--address", "http://head:8265"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "name two clusters" in done.output


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://head/ray/", "https://head/ray"),
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
    ],
)
def test_an_address_without_a_scheme_is_the_dashboard_s(given: str, meant: str) -> None:
    assert http_address(given) == meant


@pytest.mark.parametrize("given", ["ray://head:10001", "auto", "", "http://", "ftp://head:21"])
def test_an_address_of_something_else_is_refused_at_once(given: str) -> None:
    with pytest.raises(RemoteError, match=r"http://HOST:8265"):
        http_address(given)


def test_of_a_head_s_traceback_the_last_error_are_shown() -> None:
    inner = "Traceback (most recent call last):\n  File x\nValueError: the packages\ncannot be installed\n.\n"
    text = (
        f"Request failed with status code 500: Traceback:\n  File y\nRuntimeError: 400: {inner}.\n"
    )
    assert last_error(text) == "ValueError: the packages\ncannot be installed"
    assert (
        last_error("Request failed with status code 413") == "Request failed with status code 413"
    )


def test_the_token_is_looked_for_where_ray_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token() == ("", "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert find_token()[0] == "home"
    (tmp_path / "token").write_text("file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token()[0] == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert find_token() == ("variable", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() == ("", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(RemoteError, match="RAY_AUTH_TOKEN_PATH"):
        find_token()


@pytest.mark.parametrize(
    ("status", "driver", "want"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)  # fmt: skip
def test_a_job_s_exit_status_is_the_driver_s(status: str, driver: int | None, want: int) -> None:
    info: Any = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=driver)
    assert exit_code(info) == want
