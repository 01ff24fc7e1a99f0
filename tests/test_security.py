"""What the code never does: run text through a shell, unpickle strangers' files, write down a secret."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from test_plan import prepared

from orchestrator.plan import describe_cluster
from orchestrator.plan.plan import make_plan
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
    assert loaders == {("spec/load.py", "_UniqueKeys")}
    text = (PACKAGE / "spec" / "load.py").read_text(encoding="utf-8")
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
