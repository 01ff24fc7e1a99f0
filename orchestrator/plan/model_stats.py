"""Count the job's model on the meta device: no weights are loaded."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.model.build import build_model
from orchestrator.model.kept_values import kept_values
from orchestrator.model.parts import groups, hidden_matrices
from orchestrator.model.quantization import quantized_elements
from orchestrator.model.teacher import paired_layers, teacher_hidden_size
from orchestrator.plan.memory import ModelStats
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import quantized


def model_stats(spec: JobSpec, labels: tuple[str, ...]) -> ModelStats:
    """Sizes of the model that will be trained, adapters included."""
    model = build_model(spec, labels, on_meta=True)
    further: dict[str, Any] = {
        "adapted_modules": _adapted_modules(model),
        "kept_values": kept_values(model, spec.task.sample_inputs("meta")),
    }
    if quantized(spec.tuning):
        further["quantized"] = quantized_elements(model)
    if spec.distillation is not None and spec.distillation.hidden is not None:
        further["hidden_pairs"] = paired_layers(spec)
        further["teacher_hidden_size"] = teacher_hidden_size(spec)
    return stats_of(model).model_copy(update=further)


def _adapted_modules(model: Any) -> tuple[str, ...]:
    """Last parts of the names of the modules that peft adapts."""
    config = getattr(model, "peft_config", {}).get("default")
    targets = getattr(config, "target_modules", None) or ()
    names = {targets} if isinstance(targets, str) else set(targets)
    heads = set(getattr(config, "modules_to_save", None) or ())  # trained whole
    return tuple(sorted({str(name).rpartition(".")[2] for name in names - heads}))


def stats_of(model: Any) -> ModelStats:
    """Sizes of a `transformers` model, from its parameters and its config.

    Configs name sizes in many ways, some of them one per stage: of those the widest count, but for the
    hidden size, which is that of the first stage.
    """
    config = _main_config(model)
    stages = _stages(config)
    hidden = stages[0] if stages else _number(config, HIDDEN_SIZES)
    matrices = hidden_matrices(model)
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    return ModelStats(
        model_type=str(config.model_type),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        hidden_matrices=sum(p.numel() for n, p in model.named_parameters() if n in matrices),
        hidden_size=hidden,
        layers=sum(config.depths) if stages else _number(config, LAYERS) or _longest_stack(model),
        heads=_number(config, HEADS) or 1,
        intermediate_size=_number(config, INTERMEDIATE_SIZES) or 4 * hidden,
        vocab_size=_number(config, ("vocab_size",)),
        eager_attention=not stages and getattr(config, "_attn_implementation", "sdpa") == "eager",
        values_per_token=_waveform_values(config),
        image_tokens=_image_tokens(config, stages),
        decoder_layers=_number(config, ("decoder_layers", "num_decoder_layers"))
        if two_sided
        else 0,
    )


HIDDEN_SIZES = (
    "hidden_size", "n_embd", "d_model", "dim", "hidden_sizes", "embed_dim", "embed_dims", "embedding_size",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
INTERMEDIATE_SIZES = ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim")


def _main_config(model: Any) -> Any:
    """The config of the part that reads rows: of images or of text, where there is one, else the widest part."""
    config = model.config
    reads_images = getattr(model, "main_input_name", "") == "pixel_values"
    part = getattr(config, "vision_config" if reads_images else "text_config", None)
    config = part if hasattr(part, "to_dict") else config
    if _number(config, HIDDEN_SIZES):
        return config
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    parts = [one for one in inner if hasattr(one, "to_dict")]
    return max(parts, key=lambda one: _number(one, HIDDEN_SIZES), default=config)


def _number(config: Any, names: tuple[str, ...]) -> int:
    """The first of the fields that holds a number above 0, or numbers: their largest; 0 without one."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except (
            AttributeError,
            ValueError,
            RuntimeError,
        ):  # one per layer, which has no name of its own
            value = config.to_dict().get(name)
        if found := _largest(value):
            return found
    return 0


def _largest(value: Any) -> int:
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return int(value) if isinstance(value, int | float) else 0


def _stages(config: Any) -> list[int]:
    """Features of each stage of a model in stages; empty for others."""
    depths = getattr(config, "depths", None)
    if not isinstance(depths, list | tuple) or not all(isinstance(d, int) for d in depths):
        return []
    for name in ("hidden_sizes", "embed_dims", "embed_dim"):
        sizes = getattr(config, name, None)
        if isinstance(sizes, list | tuple) and len(sizes) >= len(depths):
            return [_largest(size) for size in sizes][: len(depths)]
        if isinstance(sizes, int):  # features double from stage to stage
            return [sizes * 2**i for i in range(len(depths))]
    return []


def _longest_stack(model: Any) -> int:
    """Entries of the longest list of modules."""
    from torch import nn

    return max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=0)


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


USUAL_SIDE, USUAL_STRIDE = 224, 4
"""Pixels of an image's side, and of the first stage's step, where the config of a model in stages names none."""


def _first_patch(config: Any) -> int:
    """Pixels of a side that one token of the first stage stands for; 0 where the config does not say."""
    for name in ("patch_size", "strides", "patch_stride", "patch_sizes"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if found := _largest(value):
            return found
    return 0


def _image_tokens(config: Any, stages: list[int]) -> int:
    """Patches of an image; 0 for models of anything else.

    Models in stages (ConvNeXt) halve height and width while features grow: the mean over layers,
    in tokens of the first stage's features.
    """
    size, patch = _largest(getattr(config, "image_size", None)), _first_patch(config)
    if stages and hasattr(config, "num_channels"):
        size, patch = size or USUAL_SIDE, patch or USUAL_STRIDE
    if not size or not patch:
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
