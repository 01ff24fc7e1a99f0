"""Image models of every family: what is planned of them, adapters, and rows that stay apart in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_batch_norm as batch_norm
import tiny
import torch
import transformers

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.causal import settled
from orchestrator.plan.memory import MemorySetup, activation_bytes
from orchestrator.plan.model_stats import model_stats

SIDE, LABELS, ROWS = batch_norm.SIDE, batch_norm.LABELS, 4
PATCHES: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
PYRAMID: dict[str, Any] = {
    "image_size": SIDE, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4], "strides": [4, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    **batch_norm.CONFIGS,
    "vit": PATCHES,
    "deit": PATCHES,
    "beit": {**PATCHES, "use_relative_position_bias": True},
    "dinov2": {**PATCHES, "image_size": 48, "mlp_ratio": 2},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "convnext": {"num_stages": 2, **batch_norm.STAGES},
    "convnextv2": {"num_stages": 2, "image_size": SIDE, **batch_norm.STAGES},
    "segformer": {**PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    "pvt": {**PYRAMID, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    "pvt_v2": {**PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3]},
    "bit": {"embedding_size": 8, "num_groups": 4, "layer_type": "preactivation", **batch_norm.STAGES},
    "focalnet": {
        "image_size": SIDE, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
        "focal_levels": [1, 1], "focal_windows": [3, 3],
    },
}  # fmt: skip
WIDE = {"swinv2", "levit"}
"""Their kernels on the meta device keep more than those on CPU."""


def source(kind: str, root: Path) -> Path:
    if kind in batch_norm.CONFIGS:
        return batch_norm.pretrained(kind, root)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    config.architectures = []  # of several classes with one head, the auto class then takes the first
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(root / kind)
    return root / kind


def without_noise(model: torch.nn.Module) -> torch.nn.Module:
    """In training mode, with nothing left out at random."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_rows_stay_apart_and_memory_is_planned_as_measured(
    tmp_path: Path, kind: str, tuning: str
) -> None:
    spec = batch_norm.job(source(kind, tmp_path), tmp_path / "job", tuning={"type": tuning})
    facts = model_stats(spec, LABELS)
    model: Any = without_noise(build_model(spec, LABELS))
    batch = batch_norm.batch_of(spec.task, ROWS)
    saved, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = spec.task.loss_sum(model, batch)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = sum(size for pointer, size in saved.items() if pointer not in held)
    setup = MemorySetup(
        world_size=1, stage=0, bf16=False, optimizer_states=2, offload_optimizer=False,
        offload_param=False, bucket_elements=1, gradient_checkpointing=False, on_gpu=False,
        all_logits=False,
    )  # fmt: skip
    planned = activation_bytes(facts, setup, ROWS, facts.image_tokens)
    assert 0.9 < planned / found < (2.0 if kind in WIDE else 1.4)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in trained)
    with torch.no_grad():
        together = spec.task.measure(model, batch)["loss"][0]
        alone = spec.task.measure(model, {n: t[:1] for n, t in batch.items()})["loss"][0]
    assert together == pytest.approx(alone, rel=1e-4)


def test_checkpointing_of_a_model_without_it_is_refused(tmp_path: Path) -> None:
    spec = batch_norm.job(
        source("levit", tmp_path), tmp_path / "job", gradient_checkpointing=True
    )  # fmt: skip
    with pytest.raises(OrchestratorError, match="gradient_checkpointing"):
        build_model(spec, LABELS, on_meta=True)


@pytest.mark.skipif(transformers.utils.is_timm_available(), reason="timm is installed")
@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_models_without_timm_name_the_extra(tmp_path: Path, pretrained: bool) -> None:
    config = {
        "model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 3,
        "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.8},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "label": "x"}])
    plain = {k: v for k, v in config.items() if k in ("model_type", "architecture")}
    model: dict[str, Any] = (
        {"pretrained": str(tmp_path)} if pretrained else {"pretrained": None, "config": plain}
    )
    spec = tiny.job(tmp_path, rows, tmp_path, task={"type": "image_classification"}, model=model)
    spec = settled(spec)
    assert spec.task.size_pixels == (64 if pretrained else 224)
    with pytest.raises(OrchestratorError, match=r"\[timm\]"):
        build_model(spec, LABELS, on_meta=True)


def test_an_unknown_architecture_is_named_in_one_sentence(tmp_path: Path) -> None:
    model = {"pretrained": None, "config": {"model_type": "squeezenet"}}
    with pytest.raises(OrchestratorError, match="squeezenet") as raised:
        build_model(batch_norm.job(None, tmp_path, model=model), LABELS)
    assert len(str(raised.value)) < 400
