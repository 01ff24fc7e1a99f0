"""What the code never does: run text through a shell, unpickle strangers' files, write down a secret."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_plan import prepared

from orchestrator.errors import OrchestratorError, Problem, SpecError
from orchestrator.kube.render import render
from orchestrator.kube.text import dump_documents
from orchestrator.plan import describe_cluster
from orchestrator.plan.plan import make_plan
from orchestrator.redaction import redact, secret_in
from orchestrator.report.records import append_event
from orchestrator.spec import dump_spec, parse_spec

PACKAGE = Path(__file__).parent.parent / "orchestrator"
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
EVALUATORS = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open"}
UNSAFE_YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"}
UNPICKLERS = {"train/engine.py", "train/export.py", "train/reshard.py"}
"""Files that load checkpoints of the run's own folder; docs/security.md says why."""
PLANTED = "s3cr3t-PLANTED-91c"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> str | None:
    """A keyword's value as it is written."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_no_text_reaches_a_shell_or_an_interpreter() -> None:
    found = [
        f"{file}:{call.lineno} {name}"
        for file, name, call in calls()
        if name in SHELLS | EVALUATORS | UNSAFE_YAML or option(call, "shell") not in (None, "False")
    ]
    assert found == []


def test_yaml_is_read_by_safe_loaders_only() -> None:
    loaders = {
        (file, option(call, "Loader")) for file, name, call in calls() if name == "yaml.load"
    }
    assert loaders == {("spec/yaml_text.py", "_UniqueKeys")}
    text = (PACKAGE / "spec" / "yaml_text.py").read_text(encoding="utf-8")
    assert "class _UniqueKeys(yaml.SafeLoader)" in text


def test_pickles_are_read_where_checkpoints_are_and_nowhere_else() -> None:
    loads = [
        (file, option(call, "weights_only")) for file, name, call in calls() if name == "torch.load"
    ]
    assert {file for file, safe in loads if safe != "True"} <= UNPICKLERS
    assert all(option(c, "trust_remote_code") in (None, "False") for _, _, c in calls())


def test_a_secret_of_this_environment_is_in_no_plan_and_no_job_file(
    models: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, PLANTED)
    job = {
        "name": "secret",
        "task": {"type": "text_classification", "labels": ["a", "b"]},
        "model": {"pretrained": str(models.bert)},
        "data": {"train": "s3://bucket/train.jsonl"},
        "runtime": {"secrets": ["HF_TOKEN"], "env_vars": {"NCCL_DEBUG": "WARN"}},
        "kubernetes": {"secret_env": {"HF_TOKEN": {"secret": "hub", "key": "token"}}},
    }
    spec = parse_spec(job)
    plan = make_plan(spec, describe_cluster("16cpux2"), prepared())
    for text in (plan.model_dump_json(), dump_spec(spec), repr(plan)):
        assert PLANTED not in text


# --- credentials in texts


LETTERS = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789" * 3
JWT = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (
    json.dumps({"alg": "HS256"}).encode(), json.dumps({"sub": "1234567890"}).encode(), b"signature" * 3
))  # fmt: skip
TOKENS = (
    f"hf_{LETTERS[:34]}", f"ghp_{LETTERS[:36]}", f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}", f"glpat-{LETTERS[:20]}",
    "AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "Y34FZKBOKMUTVV7A", f"sk-proj-{LETTERS[:40]}", f"sk-{LETTERS[:48]}",
    f"sk-ant-api03-{LETTERS[:40]}", "xoxb-" + "123456789012-abcdefABCDEF", f"npm_{LETTERS[:36]}", f"AIza{LETTERS[:35]}",
    JWT, f"Bearer {LETTERS[:30]}",
)  # fmt: skip
URLS = tuple(url.replace("SECRET", LETTERS[:24]) for url in (
    "https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Algorithm=AWS4&X-Amz-Signature=SECRET",
    "https://bucket.s3.amazonaws.com/x.jsonl?AWSAccessKeyId=SECRET&Expires=1", "https://cdn.example/x?a=1&Signature=SECRET",
    "https://account.blob.core.windows.net/c/x.parquet?sv=2022-11-02&sp=r&sig=SECRET",
    "https://storage.googleapis.com/b/x?X-Goog-Signature=SECRET", "https://host/x.jsonl?token=SECRET",
    "https://host/x.csv?download=1&access_token=SECRET", "https://host/x.whl?PRIVATE_TOKEN=SECRET",
    "https://user:SECRET@host/x", "s3://KEY:SECRET@bucket/x", "redis://:SECRET@host:6379",
    "https://SECRET@github.com/org/repo.git", "git+https://SECRET@github.com/org/repo.git@v1",
))  # fmt: skip
OTHERS = (
    f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={LETTERS[:40]}==",
    f"-----BEGIN RSA PRIVATE KEY-----\n{LETTERS}\n-----END RSA PRIVATE KEY-----", f"--api-key={LETTERS[:12]}",
    f"--extra-index-url https://__token__:{LETTERS[:20]}@host/simple",
)  # fmt: skip
HARMLESS = (
    "https://host:8080/a@b/c:d@e",
    "s3://bucket/a@v1/token=3/x.parquet",
    "hf://datasets/org/name@main/x.parquet",
    "https://host/x.jsonl?download=true&version=2",
    "https://huggingface.co/org/model/resolve/main/x?download=true",
    "git+ssh://git@github.com/org/repo.git@v1",
    "git+https://git@github.com/org/repo.git",
    "hdfs://user@namenode:8020/x",
    "abfss://container@account.dfs.core.windows.net/x",
    "https://${INDEX_TOKEN}@host/simple",
    "https://user:${INDEX_PASSWORD}@host/simple",
    "https://host/x?token=${TOKEN}",
    "sk-learn-random-forest-classifier-baseline",
    "task-classification-of-long-documents-v2",
    "hf_internal_testing/tiny-random-bert-for-sequence",
    "AKIA is a prefix",
    "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "desk-ABCDEFghijklmnopqrstuvwxyz0123456789",
    "pad_token=<pad>",
    "Translate: {text}\nAnswer? token=1",
    "Bearer of the ring and of good news everywhere",
    "--eos-token </s>",
    "12:30@noon",
    "/data/Signature=abc/sig=4/token=2/part-0.parquet",
    "eyJ is how they begin",
    "--token-file=/run/secrets/token",
)


@pytest.mark.parametrize("text", [*TOKENS, *URLS, *OTHERS])
def test_a_credential_is_found_wherever_it_is_and_removed(text: str) -> None:
    for whole in (text, f"see {text} now", f"x @ {text}", json.dumps({"a": [text]})):
        assert secret_in(whole), whole
        assert secret_in(redact(whole)) is None
        assert LETTERS[:12] not in redact(whole)


@pytest.mark.parametrize("text", HARMLESS)
def test_a_harmless_text_is_left_alone(text: str) -> None:
    assert secret_in(text) is None
    assert redact(text) == text


@given(st.binary(max_size=64), st.sampled_from(["", "main", "refs/pr/1"]), st.uuids())
def test_hashes_revisions_and_paths_are_no_secrets(data: bytes, revision: str, uuid: Any) -> None:
    sha256, sha1, md5 = (getattr(hashlib, n)(data).hexdigest() for n in ("sha256", "sha1", "md5"))
    for text in (
        sha256, sha1, md5, str(uuid), f"sha256:{sha256}", f"registry.example/image@sha256:{sha256}",
        f"/shared/prepared/{sha256}/train-00000.arrow", f"s3://bucket/{sha1}/{uuid}.parquet",
        f"https://host/{sha1}?revision={revision}&etag={md5}", f"org/model@{sha1}", f"checkpoint-{md5}",
    ):  # fmt: skip
        assert secret_in(text) is None


@given(st.text())
def test_redacting_twice_is_redacting_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


BASE: dict[str, Any] = {
    "name": "secret",
    "task": {"type": "causal_lm", "packing": False},
    "model": {"pretrained": "org/model"},
    "data": {"train": "s3://bucket/x.jsonl"},
}


def with_text(text: str) -> list[dict[str, Any]]:
    """Jobs that hold `text` in every place that takes one."""
    pod = {"spec": {"containers": [{"name": "ray-worker", "args": ["--x", text]}]}}
    return [
        {"data": {"train": text}},
        {"data": {"train": ["s3://bucket/a.jsonl", text]}},
        {"model": {"pretrained": text}},
        {"model": {"pretrained": "org/model", "revision": text}},
        {"model": {"config": {"model_type": "gpt2", "note": text}}},
        {"tracking": {"mlflow": text}},
        {"runtime": {"pip": [text]}},
        {"runtime": {"pip": ["x"], "pip_options": [text]}},
        {"runtime": {"env_vars": {"SETTING": text}}},
        {"runtime": {"excludes": [text]}},
        {"storage_path": text},
        {"kubernetes": {"annotations": {"note": text}}},
        {"kubernetes": {"worker": {"pod": pod}}},
    ]


@pytest.mark.parametrize("text", [TOKENS[0], TOKENS[4], JWT, *URLS, OTHERS[0], OTHERS[1]])
def test_a_job_with_a_credential_anywhere_is_refused_without_repeating_it(text: str) -> None:
    for job in with_text(text):
        with pytest.raises(SpecError) as caught:
            parse_spec({**BASE, **job}, files="there")
        assert LETTERS[:12] not in str(caught.value)
        assert all(p.fix for p in caught.value.problems), "it says what to do instead"


@pytest.mark.parametrize(
    "job",
    [
        {"kubernetes": {"gcs_fault_tolerance": {"redis": "redis://r:1", "password": LETTERS}}},
        {"runtime": {"env_vars": {"HF_TOKEN": [LETTERS]}}},
        {"tracking": {"api_key": LETTERS}},
        {"stop": {"max_steps": f"https://x:{LETTERS}@host"}},
        {"model": {"config": {"model_type": "gpt2", "api_key": LETTERS}}},
    ],
)
def test_a_field_that_is_wrong_does_not_show_its_secret(job: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({**BASE, **job}, files="there")
    assert LETTERS[:12] not in str(caught.value)


def test_fields_of_tokenizers_are_no_secrets() -> None:
    config = {"model_type": "gpt2", "pad_token": "<pad>", "bos_token": "<s>", "pad_token_id": 0}
    given = {**BASE, "model": {"config": config, "tokenizer": "org/model"}}
    assert parse_spec(given, files="there").model.config == config


def test_references_to_variables_pass_into_manifests() -> None:
    job = {
        **BASE,
        "runtime": {
            "pip": ["x"],
            "pip_options": ["--index-url=https://${INDEX_TOKEN}@host/simple"],
        },
        "kubernetes": {"cluster": "16cpux2", "image": "registry.example/x:1"},
    }
    text = dump_documents(render(parse_spec(job, files="there")))
    assert "${INDEX_TOKEN}@host" in text


def test_errors_and_events_do_not_quote_a_library_s_credentials(tmp_path: Path) -> None:
    url = URLS[0]
    events = tmp_path / "events.jsonl"
    append_event(events, "warning", text=f"GET {url} failed: 403")
    for text in (
        str(OrchestratorError(f"GET {url}: 403")),
        str(Problem("data.train", f"GET {url}: 403", value=url)),
        str(SpecError([Problem("data.train", "no such file", value=url)])),
        events.read_text(encoding="utf-8"),
    ):
        assert LETTERS[:12] not in text
    assert json.loads(events.read_text(encoding="utf-8"))["kind"] == "warning"


def test_files_named_for_an_evaluation_hold_no_secret_either() -> None:
    """Prepared rows record the names of their files."""
    from orchestrator.api import evaluate
    from orchestrator.run_folder import RunFolder

    with pytest.raises(SpecError) as caught:
        evaluate(RunFolder(Path("nowhere")), ["rows.jsonl", URLS[0]])
    assert [p.field for p in caught.value.problems] == ["data.1"]
    assert LETTERS[:12] not in str(caught.value)


# --- code in model folders


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "planted"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
LOAD = """
import sys
from orchestrator.errors import OrchestratorError
from orchestrator.model.config import own_config
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.spec import load_spec
spec = load_spec("job.yaml")
for load in (own_config, load_tokenizer):
    try:
        load(spec)
    except OrchestratorError as error:
        assert "code of its own" in str(error), error
        print("refused")
"""


def test_a_folder_with_code_runs_nothing_even_where_somebody_says_yes(
    tmp_path: Path, models: tiny.Tiny
) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    shutil.copytree(models.bert, folder)
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))
    parts = {"AutoConfig": "planted.Config", "AutoModel": "planted.Model"}
    parts |= {
        "AutoModelForSequenceClassification": "planted.Model",
        "AutoModelForCausalLM": "planted.Model",
    }
    config = {"model_type": "planted", "auto_map": parts, "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "tokenizer_class": "Tokenizer",
        "auto_map": {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "train.jsonl").write_text(
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
    )
    (tmp_path / "job.yaml").write_text(
        f"name: j\ntask: {{type: text_classification}}\nmodel: {{pretrained: {folder}}}\ndata: {{train: train.jsonl}}\n"
    )
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, input="y\n" * 20,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not marker.exists()
    assert loaded.stdout == "refused\nrefused\n", loaded.stderr
    verb = subprocess.run(
        [sys.executable, "-m", "orchestrator", "plan", "job.yaml"], cwd=tmp_path, env=environment, input="y\n" * 20,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not marker.exists()
    assert verb.returncode == 1
    assert "Traceback" not in verb.stderr


def test_loaders_that_could_run_a_folder_s_code_are_told_not_to() -> None:
    """Leaving the argument out lets transformers ask on the terminal."""
    loaders = [
        (f"{file}:{call.lineno}", call)
        for file, name, call in calls()
        if name.endswith(".from_pretrained")
        and not name.startswith(("PeftModel", "model_class", "GenerationConfig"))
    ]
    assert len(loaders) >= 5
    assert [at for at, call in loaders if option(call, "trust_remote_code") != "False"] == []
