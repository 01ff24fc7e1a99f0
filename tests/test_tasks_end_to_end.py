"""Every task on two real ZeRO workers: what they measure together is what one process measures."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from group import losses, plan_of, run_trials
from PIL import Image

from orchestrator.api import predict
from orchestrator.data.manifest import read_manifest
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.plan import Plan
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.tasks.batches import ragged
from orchestrator.train.export import build_base, export_run, load_exported

STEPS, EVAL_ROWS = 6, 13

PACKED: dict[str, Any] = {
    "type": "causal_lm",
    "model": "qwen2",
    "predicted": "completion",
    "counted": "target_tokens",
    "job": {"data": {"max_length_tokens": 64}},
}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt with the label as its chosen answer."""
    rejected = " so-so" if row["label"] == "good" else " good"
    return {"prompt": row["text"], "chosen": f" {row['label']}", "rejected": rejected}


TASKS: dict[str, dict[str, Any]] = {
    "causal_lm": {**PACKED, "rows": lambda r: {"text": r["text"]}},
    "causal_lm_instruction": {
        **PACKED,
        "rows": lambda r: {"prompt": r["text"], "answer": r["label"]},
        "task": {"rows": {"type": "instruction"}},
    },
    "causal_lm_chat": {
        **PACKED,
        "rows": lambda r: {
            "messages": [
                {"role": "user", "content": r["text"]},
                {"role": "assistant", "content": f"it was {r['label']}"},
            ]
        },
        "task": {"rows": {"type": "chat"}},
    },
    "multi_label_classification": {
        "model": "bert",
        "rows": lambda r: {"text": r["text"], "labels": [r["label"], "any"]},
        "task": {"labels": ["any", "bad", "good"]},
        "predicted": "scores",
    },
    "text_regression": {
        "model": "bert",
        "rows": lambda r: {"text": r["text"], "value": len(r["text"]) / 20},
        "predicted": "value",
    },
    "token_classification": {
        "model": "bert",
        "rows": lambda r: {
            "tokens": r["text"].split(),
            "tags": ["B-X" if w == "was" else "O" for w in r["text"].split()],
        },
        "predicted": "tags",
        "job": {"tuning": {"type": "lora"}},
    },
    "question_answering": {
        "model": "bert",
        "rows": lambda r: {
            "question": "so",
            "context": r["text"],
            "answers": {"text": ["was"], "answer_start": [r["text"].index("was")]},
        },
        "task": {"stride_tokens": 2},
        "predicted": "answer",
        "lines": ['{"question": "so", "context": "the film was great"}'] * 2,
        "job": {"data": {"max_length_tokens": 12}},
        "counted": "questions",
    },
    "preference": {
        "model": "llama",
        "rows": _pair,
        "predicted": "completion",
        "task": {"loss": {"beta": 1.0}},
        "job": {"tuning": {"type": "lora"}, "zero": {"stage": 3}, "optimizer": {"lr": 2e-2}},
    },
    "preference_orpo": {
        "type": "preference",
        "model": "llama",
        "rows": _pair,
        "predicted": "completion",
        "task": {"loss": {"type": "orpo"}},
    },
    "reward_model": {
        "model": "llama",
        "rows": _pair,
        "predicted": "reward",
        "lines": [
            '{"prompt": "the film was", "completion": " good"}',
            '{"prompt": "the film was", "completion": " dull again"}',
        ],
        "job": {"tuning": {"type": "lora"}, "optimizer": {"lr": 2e-2}},
    },
    "image_classification": {
        "model": "bert",  # not used: the model comes from its config
        "rows": lambda r: {
            "image": picture(200 if r["label"] == "good" else 50),
            "label": r["label"],
        },
        "task": {"size_pixels": 8, "channels": 1, "labels": ["bad", "good"]},
        "predicted": "label",
        "lines": ["nowhere.png", "nowhere.png"],
        "job": {
            "model": {
                "pretrained": None,
                "config": {
                    "model_type": "vit",
                    "image_size": 8,
                    "patch_size": 4,
                    "num_channels": 1,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "hidden_dropout_prob": 0.0,
                },
            }
        },
    },
    "image_classification_convnext": {
        "model": "bert",  # not used: the model comes from its config
        "rows": lambda r: {
            "image": picture(200 if r["label"] == "good" else 50),
            "label": r["label"],
        },
        "task": {
            "type": "image_classification",
            "size_pixels": 8,
            "channels": 1,
            "labels": ["bad", "good"],
        },
        "predicted": "label",
        "lines": ["nowhere.png", "nowhere.png"],
        "job": {
            "zero": {"stage": 3},
            "model": {
                "pretrained": None,
                "config": {
                    "model_type": "convnext",
                    "image_size": 8,
                    "patch_size": 2,
                    "num_channels": 1,
                    "num_stages": 2,
                    "hidden_sizes": [8, 16],
                    "depths": [1, 1],
                },
            },
        },
    },
    "speech_recognition": {
        "model": "bert",  # not used: the model comes from its config
        "rows": lambda r: {"audio": sound(r["label"]), "text": r["label"]},
        "task": {"sampling_rate_hz": 1000, "frame_samples": 20},
        "predicted": "text",
        "lines": ["nowhere.wav", "nowhere.wav"],
        "job": {
            "model": {
                "pretrained": None,
                "config": {"model_type": "wav2vec2", **tiny.WAVE_SHAPE},
            }
        },
    },
    "seq2seq": {
        "model": "t5",
        "rows": lambda r: {"source": r["text"], "target": r["label"]},
        "task": {"max_target_tokens": 6},
        "predicted": "target",
        "job": {"zero": {"stage": 3}},
    },
}


def picture(level: int) -> dict[str, Any]:
    """A grey square, as a path to a file that is written here."""
    path = Path(os.environ["TASK_FILES"]) / f"{level}.png"
    Image.new("L", (8, 8), level).save(path)
    return {"path": str(path), "bytes": None}


def sound(text: str) -> dict[str, Any]:
    """Tones that spell a text, as a path to a file that is written here."""
    path = Path(os.environ["TASK_FILES"]) / f"{text}.wav"
    path.write_bytes(tiny.tones(text))
    return {"path": str(path), "bytes": None}


def spec_of(kind: str, models: tiny.Tiny, folder: Path) -> Any:
    given = TASKS[kind]
    train = tiny.write_jsonl(
        folder / kind / "train.jsonl", [given["rows"](r) for r in tiny.labeled(60)]
    )
    held_out = tiny.write_jsonl(
        folder / kind / "eval.jsonl",
        [given["rows"](r) for r in tiny.labeled(EVAL_ROWS, seed=1)],
    )
    settings = {
        "name": kind.replace("_", "-"),
        "task": {"type": given.get("type", kind), **given.get("task", {})},
        "batch": {"global_batch_size": 8},
        "optimizer": {"lr": 5e-3},
        "stop": {"max_steps": STEPS},
        "evaluation": {"every_steps": "end"},
        "resources": {"num_workers": 2},
        "zero": {"stage": 2},
        **given.get("job", {}),
    }
    settings["data"] = {"eval": str(held_out), **settings.get("data", {})}
    return tiny.job(getattr(models, given["model"]), train, folder, **settings)


@pytest.fixture(scope="module")
def trained(
    ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, dict[str, Any]]]:
    """Plan and last evaluation of every task, all trained in one worker group."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["TASK_FILES"] = str(tmp_path_factory.mktemp("files"))
    plans = {kind: plan_of(spec_of(kind, models, folder)) for kind in TASKS}
    for plan in plans.values():
        Path(plan.run_dir).mkdir(parents=True, exist_ok=True)
    results = run_trials(list(plans.values()))
    assert [r["status"] for r in results] == ["finished"] * len(plans)
    out = {}
    for (kind, plan), result in zip(plans.items(), results, strict=True):
        folder_of_run = RunFolder(Path(plan.run_dir))
        write_json(folder_of_run.plan, plan.model_dump(mode="json"))
        export_run(plan, folder_of_run, folder_of_run.export, {"best": {"step": STEPS}})
        out[kind] = (plan, result["last_eval"])
    return out


def kept_reference(plan: Plan, split: str = "eval") -> dict[str, np.ndarray]:
    """What the workers kept of the untouched model; nothing for tasks that do not compare with it."""
    path = Path(plan.run_dir) / "reference" / f"{split}.npz"
    if not path.exists():
        return {}
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files if name != "prepared"}


def measured_alone(plan: Plan) -> dict[str, Any]:
    """Metrics of the exported model over the evaluation rows, row by row in this process."""
    task, data = plan.spec.task, plan.eval_data
    assert data is not None
    _, model, tokenizer = load_exported(RunFolder(Path(plan.run_dir)).export)
    manifest = read_manifest(Path(data.folder))
    assert manifest is not None
    rows = unpack_rows(open_shards(data.folder, manifest).take(np.arange(data.rows)))
    for name, values in kept_reference(plan).items():
        rows = [{**row, name: values[i]} for i, row in enumerate(rows)]
    parts: list[dict[str, Any]] = []
    for row in rows:
        with torch.no_grad():
            batch = task.collate([row], np.ones(1), plan.pad_token_id)
            parts.append(
                task.measure(model, batch) | {n: ragged([row[n]]) for n in task.kept_features}
            )
    gathered = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if task.needs_tokenizer:
        gathered = task.decode(gathered, tokenizer)
    return task.metrics(gathered, plan.labels)


def targets_of(plan: Plan) -> int:
    """Tokens of the evaluation rows that are predicted, by their manifest."""
    assert plan.eval_data is not None
    manifest = read_manifest(Path(plan.eval_data.folder))
    assert manifest is not None
    assert manifest.rows < EVAL_ROWS, "several rows are packed into one"
    return manifest.target_tokens


@pytest.mark.parametrize("kind", TASKS)
def test_workers_measure_what_one_process_measures(kind: str, trained: Any) -> None:
    plan, together = trained[kind]
    alone = measured_alone(plan)
    counted = TASKS[kind].get("counted", "rows")
    assert together[counted] == (targets_of(plan) if counted == "target_tokens" else EVAL_ROWS)
    assert plan.metric in plan.spec.task.metric_names
    for name in plan.spec.task.metric_names:
        assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name
        assert math.isfinite(together[name])


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_learns(kind: str, trained: Any) -> None:
    got = losses(trained[kind][0])
    assert len(got) == STEPS
    assert min(got[-2:]) < 0.97 * got[0]


@pytest.mark.parametrize("kind", TASKS)
def test_an_exported_model_answers_lines_as_the_task_says(kind: str, trained: Any) -> None:
    plan, _ = trained[kind]
    lines = TASKS[kind].get("lines", ["the film was great", "my lunch was dull again"])
    answers = predict(RunFolder(Path(plan.run_dir)), lines)
    assert len(answers) == len(lines)
    assert all(TASKS[kind]["predicted"] in answer for answer in answers)


def test_the_reference_is_what_the_untouched_model_says_of_every_row(trained: Any) -> None:
    plan, _ = trained["preference"]
    task, base = plan.spec.task, build_base(plan).eval()
    for split, data in (("train", plan.train_data), ("eval", plan.eval_data)):
        manifest = read_manifest(Path(data.folder))
        assert manifest is not None
        rows = unpack_rows(open_shards(data.folder, manifest).take(np.arange(data.rows)))
        with torch.no_grad():
            wanted = [task.reference(base, task.collate([r], np.ones(1), 0)) for r in rows]
        for name, values in kept_reference(plan, split).items():
            assert values == pytest.approx([float(w[name][0]) for w in wanted], rel=1e-4), name


def test_preference_tuning_begins_where_policy_and_reference_are_one(trained: Any) -> None:
    assert losses(trained["preference"][0])[0] == pytest.approx(math.log(2), abs=1e-5)
