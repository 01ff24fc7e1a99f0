"""Facts about the job's model, counted on the meta device: no weights are loaded."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.model.build import build_model
from orchestrator.model.parts import groups
from orchestrator.model.quantization import quantized_elements
from orchestrator.model.teacher import paired_layers, teacher_hidden_size
from orchestrator.plan.memory import ModelFacts
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import quantized


def model_facts(spec: JobSpec, labels: tuple[str, ...]) -> ModelFacts:
    """Sizes of the model that will be trained, adapters included."""
    model = build_model(spec, labels, on_meta=True)
    further: dict[str, Any] = {"adapted_modules": _adapted_modules(model)}
    if quantized(spec.tuning):
        further["quantized"] = quantized_elements(model)
    if spec.distillation is not None and spec.distillation.hidden is not None:
        further["hidden_pairs"] = paired_layers(spec)
        further["teacher_hidden_size"] = teacher_hidden_size(spec)
    return facts_of(model).model_copy(update=further)


def _adapted_modules(model: Any) -> tuple[str, ...]:
    """Last parts of the names of the modules that peft adapts."""
    config = getattr(model, "peft_config", {}).get("default")
    targets = getattr(config, "target_modules", None) or ()
    names = {targets} if isinstance(targets, str) else set(targets)
    heads = set(getattr(config, "modules_to_save", None) or ())  # trained whole
    return tuple(sorted({str(name).rpartition(".")[2] for name in names - heads}))


def facts_of(model: Any) -> ModelFacts:
    """Sizes of a `transformers` model, from its parameters and its config."""
    config = model.config
    config = getattr(config, "text_config", None) or config

    def first(*names: str, default: int = 0) -> int:
        return int(next((getattr(config, n) for n in names if getattr(config, n, None)), default))

    stages = list(getattr(config, "hidden_sizes", None) or ())
    hidden = stages[0] if stages else first("hidden_size", "n_embd", "d_model", "dim")
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    return ModelFacts(
        model_type=str(config.model_type),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        hidden_size=hidden,
        layers=sum(config.depths)
        if stages
        else first("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        heads=first("num_attention_heads", "n_head", "n_heads", default=1),
        intermediate_size=first(
            "intermediate_size",
            "n_inner",
            "d_ff",
            "hidden_dim",
            "encoder_ffn_dim",
            default=4 * hidden,
        ),
        vocab_size=first("vocab_size"),
        eager_attention=not stages and getattr(config, "_attn_implementation", "sdpa") == "eager",
        values_per_token=_waveform_values(config),
        image_tokens=_image_tokens(config, stages),
        decoder_layers=first("decoder_layers", "num_decoder_layers") if two_sided else 0,
    )


def part_rates(
    spec: JobSpec, labels: tuple[str, ...], peak_lr: float
) -> tuple[tuple[float, int], ...]:
    """(peak learning rate, trainable parameters) by part of the model, lowest first; empty for one rate.

    Raises OrchestratorError where `optimizer.head_lr` or `layer_decay` finds no such part.
    """
    optimizer = spec.optimizer
    if optimizer.head_lr is None and optimizer.layer_decay == 1:
        return ()
    model: Any = build_model(spec, labels, on_meta=True)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counts: dict[float, int] = {}
    for group in groups(model, spec, peak_lr):
        lr = peak_lr * group.lr_scale
        counts[lr] = counts.get(lr, 0) + sum(sizes[name] for name in group.names)
    return tuple(sorted(counts.items()))


def _image_tokens(config: Any, stages: list[int]) -> int:
    """Patches of an image; 0 for models of anything else.

    Models in stages (ConvNeXt) halve height and width while features grow: the mean over layers,
    in tokens of the first stage's features.
    """
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return 0
    if not stages:
        return (size // patch) ** 2 + 1
    sides = [max(1, size // patch // 2**i) for i in range(len(stages))]
    work = sum(n * s * s * h for n, s, h in zip(config.depths, sides, stages, strict=True))
    return -(-work // (sum(config.depths) * stages[0]))


def _waveform_values(config: Any) -> int:
    """Values that convolutions over a waveform keep per output: each layer's result, normed, and
    through its activation."""
    strides, sizes = getattr(config, "conv_stride", None), getattr(config, "conv_dim", None)
    if not strides or not isinstance(sizes, list | tuple):
        return 0
    later = [math.prod(strides[i + 1 :]) for i in range(len(strides))]
    return 3 * sum(size * n for size, n in zip(sizes, later, strict=True))
