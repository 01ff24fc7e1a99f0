"""Images: read from paths and bytes, scaled once, classified; models that keep rows apart."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig
from transformers import ViTForImageClassification as ViT

from orchestrator.data.stream import StepRows
from orchestrator.errors import SpecError
from orchestrator.model.build import build_model
from orchestrator.plan.memory import MemorySetup, activation_bytes
from orchestrator.plan.model_stats import stats_of
from orchestrator.tasks import BadRow, ImageClassification
from orchestrator.train import evaluate
from orchestrator.train.evaluate import CACHE_BYTES

LABELS = ("dark", "light")
TASK = ImageClassification(
    type="image_classification", size_pixels=8, mean=(0.2, 0.4, 0.6), std=(0.5,), labels=LABELS
)
SHAPE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def png(color: Any, mode: str = "RGB", side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), color).save(out, "PNG")
    return out.getvalue()


def encoded(value: Any, task: ImageClassification = TASK) -> Any:
    (row,) = task.encode([{"image": value, "label": "dark"}], None, 0, LABELS)
    return row


def test_paths_bytes_and_what_datasets_writes_are_the_same_image(tmp_path: Path) -> None:
    data = png((255, 128, 0))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    given = (data, str(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)})
    rows = [encoded(value) for value in given]
    assert all(np.array_equal(row["pixels"], rows[0]["pixels"]) for row in rows)
    batch = TASK.collate(rows, np.ones(4), 0)
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    values = batch["pixel_values"][0, :, 3, 5].tolist()
    assert values == pytest.approx([(1 - 0.2) / 0.5, (128 / 255 - 0.4) / 0.5, -0.6 / 0.5])


def test_images_of_any_size_and_mode_are_brought_to_the_models(tmp_path: Path) -> None:
    grey = ImageClassification(type="image_classification", size_pixels=8, channels=1)
    for data in (
        png(100, "L", 20),
        png((100, 100, 100), side=5),
        png((100, 100, 100, 255), "RGBA"),
    ):
        assert encoded(data)["pixels"].tolist() == [100] * 3 * 64
        assert encoded(data, grey)["pixels"].tolist() == [100] * 64


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"image": None}, "must be a path or bytes"),
        ({"image": 3}, "must be a path or bytes"),
        ({"image": b"no image"}, "cannot be read as an image"),
        ({"image": png(0)[:40]}, "cannot be read as an image"),
        ({"image": "nowhere.png"}, "cannot be read as an image"),
        ({"label": "odd"}, "unknown label 'odd'"),
    ],
)
def test_what_is_no_image_is_a_bad_row(row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([{"image": png(0), "label": "dark"} | row], None, 0, LABELS)
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_the_loss_is_the_one_of_transformers_and_predictions_follow_it() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(**SHAPE, **TASK.config_overrides(LABELS))).eval()
    images = [png((200, 10, 30)), png((0, 90, 250)), png(0)]
    rows = TASK.encode([{"image": i, "label": "light"} for i in images], None, 0, LABELS)
    batch = TASK.collate(rows, np.array([1, 1, 0]), 0)
    with torch.no_grad():
        theirs = model(pixel_values=batch["pixel_values"][:2], labels=batch["labels"][:2]).loss
        assert float(TASK.loss_sum(model, batch)) == pytest.approx(2 * float(theirs), rel=1e-5)
        measured = TASK.measure(model, batch)
    predicted = TASK.predict(model, None, [{"image": i} for i in images], 0)
    assert [p["label"] for p in predicted] == [LABELS[i] for i in measured["predicted"]]
    assert TASK.predict(model, None, [{"image": "nowhere.png"}], 0)[0]["label"] is None


def job(tmp_path: Path, config: dict[str, Any], **fields: Any) -> Any:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "label": "dark"}])
    task = {"type": "image_classification", "size_pixels": 8, **fields.pop("task", {})}
    model = {"pretrained": None, "config": config}
    return tiny.job(tmp_path, rows, tmp_path, task=task, model=model, **fields)


def test_a_model_with_several_classes_for_images_is_built_from_its_config(tmp_path: Path) -> None:
    config = {"model_type": "deit", **SHAPE, "image_size": 8}
    model = build_model(job(tmp_path, config), LABELS, on_meta=True)
    assert type(model).__name__ == "DeiTForImageClassification"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"task": {"mean": [0.5, 0.5]}}, "needs 1 or 3 values"),
        ({"task": {"std": [0.0]}}, "must be above 0"),
    ],
)
def test_scaling_that_cannot_be_is_refused(
    tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(SpecError, match=why):
        job(tmp_path, {"model_type": "vit", **SHAPE}, **fields)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_memory_of_image_models_is_about_what_autograd_keeps(kind: str) -> None:
    model: Any = (
        ViT(ViTConfig(image_size=64, patch_size=8, hidden_size=128, num_hidden_layers=3,
                      intermediate_size=512, num_attention_heads=4))
        if kind == "vit"
        else ConvNextForImageClassification(
            ConvNextConfig(image_size=64, hidden_sizes=[32, 64, 128], depths=[1, 2, 1], num_stages=3)
        )
    )  # fmt: skip
    rows, kept, alive = 4, {}, []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model.train()(pixel_values=torch.zeros(rows, 3, 64, 64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    facts = stats_of(model)
    assert facts.layers == (3 if kind == "vit" else 4)
    setup = MemorySetup(
        world_size=1, stage=0, bf16=False, optimizer_states=2, offload_optimizer=False,
        offload_param=False, bucket_elements=1, gradient_checkpointing=False, on_gpu=False,
        all_logits=False,
    )  # fmt: skip
    estimate = activation_bytes(facts, setup, rows, facts.image_tokens)
    assert measured == pytest.approx(estimate, rel=0.35)


@pytest.mark.parametrize(("size_bytes", "kept"), [(CACHE_BYTES, True), (CACHE_BYTES + 1, False)])
def test_evaluation_images_stay_in_memory_by_their_bytes(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, kept: bool
) -> None:
    step = StepRows(0, [{}], np.ones(1), np.zeros(1), 1, 1)
    monkeypatch.setattr(evaluate, "StepStream", lambda *_: [step])
    monkeypatch.setattr(evaluate.dist, "get_rank", lambda: 1)
    evaluator: Any = object.__new__(evaluate.Evaluator)
    evaluator.data = SimpleNamespace(size_bytes=size_bytes, tokens=1, rows=1)
    evaluator.global_batch_size, evaluator._kept, evaluator._key = 1, {}, "rows"
    assert len(list(evaluator._steps())) == 1
    assert ("rows" in evaluator._kept) == kept
