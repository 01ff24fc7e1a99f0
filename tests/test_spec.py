"""The job file: what is read, what is refused and in which words, what is written back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec import JobSpec, apply_overrides, dump_spec, load_spec, parse_spec, read_yaml
from orchestrator.spec.field_docs import field_docs
from orchestrator.spec.optimizers import SGD
from orchestrator.spec.reference import json_schema, reference_page
from orchestrator.spec.schedule import CosineSchedule
from orchestrator.spec.validation_errors import OTHER_NAMES
from orchestrator.tasks import TextClassification
from orchestrator.values import model_members

EXAMPLE = """\
name: reviews
task:
  type: text_classification
  labels: ["0", "1e5", "yes"]
model:
  config: {model_type: bert, hidden_size: 32, layer_norm_eps: 1e-12}
  tokenizer: org/words
data:
  train: TRAIN
  eval_fraction: 0.1
  order: {shuffle: windows, window_rows: 1000}
optimizer: {lr: 1e-4, betas: [0.9, 0.95]}
schedule: {type: cosine, warmup_ratio: 0.1}
batch: {global_batch_size: 64}
zero: {stage: 2}
stop: {max_epochs: 1.5}
"""


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "train.jsonl", tiny.labeled(4))


@pytest.fixture
def base(train: Path) -> dict[str, Any]:
    """The shortest job there is."""
    return {
        "name": "job",
        "task": {"type": "text_classification"},
        "model": {"pretrained": "org/model"},
        "data": {"train": str(train)},
    }


@pytest.fixture
def example(tmp_path: Path, train: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(EXAMPLE.replace("TRAIN", str(train)))
    return path


def refused(data: dict[str, Any]) -> dict[str, str]:
    """Field → sentence of every problem of `data`."""
    with pytest.raises(SpecError) as caught:
        parse_spec(data)
    return {p.field: str(p) for p in caught.value.problems}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return path


def test_all_problems_are_told_at_once(base: dict[str, Any]) -> None:
    problems = refused(
        {
            **base,
            "name": "Not A Name",
            "model": {"pretrained": "a", "config": {"model_type": "bert"}, "tokenizer": "t"},
            "data": {"train": "missing.jsonl", "eval_fraction": 1.5},
            "optimizer": {"lr": -1, "momentum": 0.9},
            "schedule": {"type": "cosine", "warmup_steps": 10, "warmup_ratio": 0.1},
            "batch": {"global_batch_size": 4, "micro_batch_size": 8},
            "stop": {"max_steps": 10},
            "precision": "fp16",
        }
    )
    assert set(problems) == {
        "name",
        "model",
        "data.train",
        "data.eval_fraction",
        "optimizer.lr",
        "optimizer.momentum",
        "schedule.warmup_ratio",
        "schedule.warmup_steps",
        "batch.micro_batch_size",
        "precision",
    }


def test_unknown_kinds_and_missing_sections_do_not_hide_other_problems(
    base: dict[str, Any],
) -> None:
    del base["name"]
    problems = refused(
        {
            **base,
            "task": {"type": "text_clasification", "labels": ["a", "b"]},
            "optimizer": {"type": "adan", "momentum": 0.5},
            "evaluation": {"metric": "f1_macro"},
            "zero": {"stage": 0, "offload_optimizer": "cpu"},
        }
    )
    assert set(problems) == {"name", "task.type", "optimizer.type", "zero.offload_optimizer"}


def test_a_broken_field_brings_no_second_complaint_about_its_section(base: dict[str, Any]) -> None:
    assert set(refused({**base, "model": {"pretrained": 5}})) == {"model.pretrained"}


@pytest.mark.parametrize(
    ("change", "field", "nearest"),
    [
        ({"optimiser": {}}, "optimiser", "optimizer"),
        ({"batch": {"global_row": 8}}, "batch.global_row", "global_batch_size"),
        ({"data": {"order": {"shufle": "full"}}}, "data.order.shufle", "shuffle"),
        ({"schedule": {"type": "cosin"}}, "schedule.type", "cosine"),
        ({"task": {"type": "casual_lm"}}, "task.type", "causal_lm"),
        ({"task": {"type": "causal_lm", "rows": {"type": "chats"}}}, "task.rows.type", "chat"),
        ({"precision": "bf61"}, "precision", "bf16"),
        ({"resources": {"num_workers": {"min": 1, "max": 2, "maxx": 3}}}, "resources.num_workers.maxx",
         "max"),
        ({"tuning": {"type": "lora", "target_modules": "all-liner"}}, "tuning.target_modules",
         "all-linear"),
        ({"tuning": {"type": "lora", "rslora": True}}, "tuning.rslora", "use_rslora"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest_one(
    base: dict[str, Any], change: dict[str, Any], field: str, nearest: str
) -> None:
    (section, content), *_ = change.items()
    merged = {**base.get(section, {}), **content} if isinstance(content, dict) else content
    assert f"did you mean '{nearest}'?" in refused({**base, section: merged})[field]


@pytest.mark.parametrize(
    ("change", "field", "place"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing", "regularization.label_smoothing"),
        ({"optimizer": {"warmup_ratio": 0.1}}, "optimizer.warmup_ratio", "schedule.warmup_ratio"),
        ({"learning_rate": 1e-4}, "learning_rate", "optimizer.lr"),
    ],
)
def test_a_field_in_the_wrong_place_or_by_another_tools_name_is_told_where_it_stands(
    base: dict[str, Any], change: dict[str, Any], field: str, place: str
) -> None:
    assert f"did you mean {place}?" in refused({**base, **change})[field]


def test_every_name_of_another_tool_points_at_a_field() -> None:
    known = set(JobSpec.model_fields) | {
        f"{section}.{name}"
        for section, info in JobSpec.model_fields.items()
        for model in model_members(info.annotation)
        for name in model.model_fields
    }
    assert {path for paths in OTHER_NAMES.values() for path in paths} <= known


def test_a_list_of_refused_items_is_not_called_empty_as_well(base: dict[str, Any]) -> None:
    found = refused({**base, "schedule": {"type": "step", "milestones": [5, 3]}})
    assert list(found) == ["schedule.milestones.0", "schedule.milestones.1"]


def test_a_bare_yes_or_number_among_labels_is_told_to_be_quoted(base: dict[str, Any]) -> None:
    problems = refused({**base, "task": {**base["task"], "labels": yaml.safe_load("[yes, 1]")}})
    assert set(problems) == {"task.labels.0", "task.labels.1"}
    assert all("in quotes" in text for text in problems.values())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"evaluation": {"metric": "perplexity"}}, "evaluation.metric"),
        ({"evaluation": {"metric": "accuracy"}}, "evaluation.metric"),
        ({"evaluation": {"baseline_rows": 9}}, "evaluation.baseline_rows"),
        ({"model": {"config": {"model_type": "bert"}, "tokenizer": "t"},
          "evaluation": {"baseline_rows": 9}}, "evaluation.baseline_rows"),
        ({"zero": {"stage": 2, "offload_param": "cpu"}}, "zero.offload_param"),
        ({"resources": {"num_workers": {"min": 3, "max": 2}}}, "resources.num_workers.min"),
        ({"resources": {"num_workers": 0}}, "resources.num_workers"),
        ({"resources": {"gpus_per_worker": 0}, "zero": {"offload_optimizer": "cpu"}},
         "zero.offload_optimizer"),
        ({"optimizer": {"type": "sgd", "nesterov": True, "momentum": 0}}, "optimizer.nesterov"),
        ({"task": {"type": "text_classification", "labels": ["a", "a"]}}, "task.labels"),
        ({"task": {"type": "text_classification", "labels": ["a"]}}, "task.labels"),
        ({"model": {"config": {"model_type": "llama"}}}, "model.tokenizer"),
        ({"model": {"config": {"vocab_size": 9}, "tokenizer": "t"}}, "model.config.model_type"),
        ({"model": {"pretrained": "./no/such/folder"}}, "model.pretrained"),
        ({"task": {"type": "causal_lm"}, "evaluation": {"baseline_rows": 9}},
         "evaluation.baseline_rows"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(
    base: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    assert list(refused({**base, **change})) == [field]


@pytest.mark.parametrize("asked", [{"metric": "accuracy"}, {"baseline_rows": 9}])
def test_what_is_measured_on_evaluation_rows_needs_some(
    base: dict[str, Any], asked: dict[str, Any]
) -> None:
    job = {**base, "evaluation": asked}
    (problem,) = refused(job).values()
    assert "data.eval_fraction=0.1" in problem
    mended = {**base["data"], "eval_fraction": 0.1}
    parse_spec({**job, "data": mended})
    broken = {**base["data"], "eval_fraction": 1.5}
    assert set(refused({**job, "data": broken})) == {"data.eval_fraction"}, "wrong, not missing"


def test_the_shortest_job_is_accepted(base: dict[str, Any]) -> None:
    assert parse_spec(base).optimizer.lr == "auto"


def test_overrides_reach_sections_that_the_file_does_not_have(base: dict[str, Any]) -> None:
    spec = parse_spec(
        apply_overrides(
            base,
            ["optimizer.lr=3e-5", "schedule.warmup_steps=7", "data.order.shuffle=none",
             "task.labels=['no', 'yes']", "optimizer.betas=[0.8, 0.9]"],
        )
    )  # fmt: skip
    assert spec.optimizer.lr == 3e-5
    assert spec.optimizer.betas == (0.8, 0.9)
    assert spec.schedule.warmup_steps == 7
    assert spec.data.order.shuffle == "none"
    assert "optimizer" not in base, "the mapping that was handed in must stay as it was"


def test_an_override_replaces_what_the_file_says(example: Path) -> None:
    assert load_spec(example, ["optimizer.lr=2e-5", "optimizer.lr=1e-5"]).optimizer.lr == 1e-5
    assert load_spec(example, ["data.order.window_rows=5"]).data.order.shuffle == "windows"
    replaced = load_spec(example, ["optimizer={type: sgd}"])
    assert isinstance(replaced.optimizer, SGD)


def test_every_override_that_is_none_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        apply_overrides({}, ["optimizer.lr", "=3", "seed=[1", "seed=1"])
    assert [p.field for p in caught.value.problems] == ["optimizer.lr", "=3", "seed"]


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"line 3, column 3: .*duplicate key 'lr'"):
        read_yaml(written(tmp_path, "optimizer:\n  lr: 1\n  lr: 2\n"))


def test_merge_keys_bring_defaults_that_a_section_may_override(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"
    assert read_yaml(written(tmp_path, text))["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['true']",
        "name: !!python/name:os.system",
        "[1, 2]: 3",
        "name: [",
        "- a\n- b\n",
        "",
        "just words",
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError):
        read_yaml(written(tmp_path, text))


def test_a_missing_or_unreadable_file_is_a_spec_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(latin)


def test_exponents_are_numbers_with_or_without_a_dot(example: Path) -> None:
    spec = load_spec(example)
    assert spec.optimizer.lr == 1e-4
    assert spec.model.config is not None
    assert spec.model.config["layer_norm_eps"] == 1e-12
    assert isinstance(spec.task, TextClassification)
    assert spec.task.labels == ("0", "1e5", "yes"), "quoted, it is text"


def test_a_dumped_spec_loads_back_equal(example: Path, tmp_path: Path) -> None:
    spec = load_spec(example, ["optimizer={type: sgd, lr: 1e-3}", "tuning.freeze=['*emb*']"])
    again = load_spec(written(tmp_path, dump_spec(spec)))
    assert again == spec
    assert dump_spec(again) == dump_spec(spec)
    assert "seed" not in yaml.safe_load(dump_spec(spec)), "what was not set stays unset"


def test_a_spec_cannot_be_changed(base: dict[str, Any]) -> None:
    spec = parse_spec(base)
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.optimizer.lr = 1.0  # type: ignore[misc]


def test_the_json_schema_accepts_what_the_loader_accepts(
    example: Path, base: dict[str, Any]
) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for data in (read_yaml(example), base, {**base, "optimizer": {"lr": 0.1}}):
        assert list(validator.iter_errors(data)) == []
        parse_spec(data)


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {}},
        {"optimizer": {"learning_rate": 1}},
        {"optimizer": {"type": "adan"}},
        {"data": {"train": "x", "order": {"shufle": "full"}}},
        {"batch": {"global_batch_size": 0}},
        {"precision": "fp16"},
        {"name": "A B"},
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(
    base: dict[str, Any], change: dict[str, Any]
) -> None:
    data = {**base, **change}
    assert refused(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())


def test_the_reference_page_explains_every_field() -> None:
    page = reference_page()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.S | re.M))
    seen = 0
    for title, model in walk("", JobSpec):
        text = next(t for name, t in sections.items() if name == title)
        for name in model.model_fields:
            row = re.search(rf"^\| `{name}` \|(.+)\|$", text, re.M)
            assert row, f"{title}.{name} is not on the page"
            if name != "type":
                meaning = field_docs(model).get(name, "")
                assert meaning, f"{title}.{name} is not documented"
                assert " ".join(meaning.split())[:30].replace("|", "\\|") in row[1]
            seen += 1
    assert seen > 80


def walk(path: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Every section of the job file, by the title the page gives it."""
    kind = model.model_fields.get("type")
    suffix = f" (type: {kind.annotation.__args__[0]})" if path and kind else ""  # type: ignore[union-attr]
    out = [(f"{path}{suffix}" or "job", model)]
    for name, info in model.model_fields.items():
        for member in model_members(info.annotation):
            out += walk(f"{path}.{name}".lstrip("."), member)
    return out


HEAVY = {"torch", "ray", "deepspeed", "transformers", "numpy", "pyarrow", "pandas", "peft"}


def run_python(code: str, *arguments: str) -> str:
    """Return the standard output of a fresh interpreter."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    return done.stdout


MOST_MODULES = 500
"""`check` imports 420; torch alone would add a thousand. benchmarks/check.py times it."""
CHECK = """
import sys
from orchestrator.cli import main
sys.argv = ["orchestrator", "check", sys.argv[1]]
try:
    main()
except SystemExit as end:
    assert not end.code
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_checking_a_job_imports_nothing_heavy(example: Path) -> None:
    loaded = run_python(CHECK, str(example))
    assert "ok reviews: text_classification" in loaded
    assert {"orchestrator", "typer", "rich"} <= set(loaded.split())
    assert not HEAVY & set(loaded.split())


def test_checking_a_job_imports_few_modules(example: Path) -> None:
    count = run_python(f"{CHECK}\nprint(len(sys.modules))", str(example)).split()[-1]
    assert int(count) < MOST_MODULES


def test_unions_are_told_apart_by_type_alone(base: dict[str, Any]) -> None:
    spec = parse_spec({**base, "schedule": {"type": "cosine"}, "optimizer": {"type": "sgd"}})
    assert isinstance(spec.schedule, CosineSchedule)
    assert isinstance(spec.optimizer, SGD)
