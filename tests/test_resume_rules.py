"""Which jobs may continue a run: the same mathematics on the same content, wherever it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_plan import LAPTOP, changed, prepared

from orchestrator.effects import decided_by
from orchestrator.errors import OrchestratorError, RunExistsError
from orchestrator.launch.run_lock import compare_content, locked
from orchestrator.model import identity
from orchestrator.model.identity import ModelIdentity, check_base, identity_of, source_identity
from orchestrator.plan import Plan, make_plan
from orchestrator.run_folder import RunFolder, read_json, write_json
from orchestrator.spec import JobSpec
from orchestrator.train.export import build_base


@pytest.fixture
def base(models: tiny.Tiny, tmp_path: Path) -> Path:
    """A copy of a model that a test may change."""
    return Path(shutil.copytree(models.bert, tmp_path / "base"))


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> JobSpec:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(4))
    return tiny.job(base, rows, tmp_path, data={"eval": str(rows)}, tuning={"type": "lora"})


def plan_of(spec: JobSpec) -> Plan:
    return make_plan(spec, LAPTOP, prepared(rows=64, eval_rows=8), Path("/"))


def launch(spec: JobSpec, plan: Plan | None = None) -> None:
    """Claim the run folder as a launch does."""
    with locked(plan or plan_of(spec), fresh=False):
        pass


def flip(base: Path) -> None:
    """Change one weight of a model, not its size."""
    path = base / "model.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name] = weights[name] + torch.finfo(torch.float32).eps
    save_file(weights, path, metadata={"format": "pt"})


def test_other_weights_under_the_same_name_are_refused(spec: JobSpec, base: Path) -> None:
    launch(spec)
    launch(spec)
    flip(base)
    with pytest.raises(RunExistsError, match=r"model\.pretrained"):
        launch(spec)


def test_the_same_weights_and_rows_at_another_path_are_accepted(
    spec: JobSpec, base: Path, tmp_path: Path
) -> None:
    launch(spec)
    base.rename(tmp_path / "moved")
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = changed(
        spec, f"model.pretrained={tmp_path}/moved", f"model.tokenizer={tmp_path}/moved",
        f"data.train=[{tmp_path}/moved.jsonl]", f"data.eval=[{tmp_path}/moved.jsonl]",
    )  # fmt: skip
    launch(moved)
    flip(tmp_path / "moved")
    with pytest.raises(RunExistsError, match="weights"):
        launch(moved)


@pytest.mark.parametrize("part", ["train_data", "eval_data"])
def test_other_rows_are_refused_and_a_moved_folder_of_them_is_not(part: str, spec: JobSpec) -> None:
    plan = plan_of(spec)
    launch(spec, plan)
    rows = getattr(plan, part)

    def at(folder: str) -> Plan:
        return plan.model_copy(update={part: rows.model_copy(update={"folder": folder})})

    launch(spec, at(f"/elsewhere/{rows.folder}"))
    with pytest.raises(RunExistsError, match="the content of"):
        launch(spec, at("another"))


def test_a_teacher_at_another_path_is_accepted_by_its_answers(
    spec: JobSpec, tmp_path: Path
) -> None:
    plan = plan_of(spec)
    old = plan.model_dump(mode="json")
    old["train_data"]["teacher_folder"] = "/a/rows-teacher-1"
    new = json.loads(json.dumps(old))
    new["train_data"]["teacher_folder"] = "/b/rows-teacher-1"
    assert "distillation.teacher" in compare_content(old, new, tmp_path)[0]
    new["train_data"]["teacher_folder"] = "/b/rows-teacher-2"
    same, other = compare_content(old, new, tmp_path)
    assert "distillation.teacher" not in same
    assert other == ["the content of the teacher"]


def test_plans_without_an_identity_compare_paths(spec: JobSpec, base: Path, tmp_path: Path) -> None:
    launch(spec)
    file = RunFolder(Path(plan_of(spec).run_dir)).plan
    write_json(file, {k: v for k, v in read_json(file).items() if k != "base"})
    shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(RunExistsError, match=r"model\.pretrained"):
        launch(changed(spec, f"model.pretrained={tmp_path}/copy"))
    launch(spec)


def test_an_adapter_is_not_put_on_other_weights(spec: JobSpec, base: Path) -> None:
    plan = plan_of(spec)
    build_base(plan)
    flip(base)
    with pytest.raises(OrchestratorError, match="other weights"):
        build_base(plan)
    with pytest.raises(OrchestratorError, match="other weights"):
        check_base(spec, plan.base)
    check_base(spec, None)


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a weight": (flip, True),
    "a file less": (lambda b: (b / "model.safetensors").unlink(), True),
    "the config": (lambda b: edit(b, hidden_act="relu"), True),
    "the version in the config": (lambda b: edit(b, transformers_version="9"), False),
    "a tokenizer file": (lambda b: (b / "tokenizer_config.json").write_text("{}"), False),
    "a readme": (lambda b: (b / "README.md").write_text("x"), False),
    "its time": (lambda b: (b / "model.safetensors").touch(), False),
}


def edit(base: Path, **fields: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("what", CHANGES)
def test_the_identity_is_that_of_what_the_model_computes(
    what: str, base: Path, spec: JobSpec
) -> None:
    before = identity_of(spec)
    change, matters = CHANGES[what]
    change(base)
    assert (before != identity_of(spec)) == matters


def test_large_files_are_sampled(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "HASHED_BYTES", 1000)
    monkeypatch.setattr(identity, "PIECE_BYTES", 50)
    monkeypatch.setattr(identity, "SAMPLES", 4)
    file = base / "model.safetensors"
    before = source_identity(str(base), None)
    for at in (0, file.stat().st_size - 1):
        whole = file.read_bytes()
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        assert source_identity(str(base), None).differs(before), at
        file.write_bytes(whole)
    file.write_bytes(file.read_bytes() + b"x")
    assert source_identity(str(base), None).differs(before)


def hub(cache: Path, commit: str, source: Path) -> None:
    """Put a model into a hub cache as `main` of `org/name`."""
    folder = cache / "models--org--name"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_a_hub_id_is_known_by_its_commit_and_its_content(
    models: tiny.Tiny, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    hub(cache, "a" * 40, base)
    first = source_identity("org/name", None)
    assert first.commit == "a" * 40
    assert first.differs(source_identity(str(models.bert), None)) is False, "a copy of it"
    flip(base)
    hub(cache, "b" * 40, base)
    moved = source_identity("org/name", None)
    assert first.differs(moved)
    assert not source_identity("org/name", "a" * 40).differs(first)
    without = ModelIdentity(commit="a" * 40)
    assert (without.differs(first), without.differs(moved)) == (False, True)
    assert source_identity("org/unknown", None).differs(first) is None


DEPENDENTS = {
    "stop.target=0.5": {"evaluation.every_steps", "evaluation.metric"},
    "stop.patience=3": {"evaluation.every_steps", "evaluation.metric"},
    "stop.overfitting_evals=3": {"evaluation.every_steps"},
    "stop.max_loss_ratio=3": {"evaluation.every_steps"},
    "schedule.type=plateau": {"evaluation.every_steps", "evaluation.metric"},
    "schedule={type: plateau, metric: loss}": {"evaluation.every_steps"},
    "stop.max_time_s=100": set(),
}


@pytest.mark.parametrize("setting", DEPENDENTS)
@pytest.mark.parametrize("change", ["evaluation.every_steps=5", "evaluation.metric=f1_macro"])
def test_evaluation_may_change_only_where_no_decision_depends_on_it(
    setting: str, change: str, spec: JobSpec
) -> None:
    begun = changed(spec, setting)
    launch(begun)
    field = change.partition("=")[0]
    if field in DEPENDENTS[setting]:
        with pytest.raises(RunExistsError) as caught:
            launch(changed(begun, change))
        assert field in str(caught.value)
        section = setting.partition("=")[0].split(".")[0]
        assert section in str(caught.value), "the field that depends on it"
    else:
        launch(changed(begun, change))
    launch(changed(begun, "evaluation.baseline_rows=8"))


def test_dependents_of_a_job_without_decisions_are_none(spec: JobSpec) -> None:
    assert decided_by(spec) == {}
