"""The model itself: weights or none, checked for what the task needs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config
from orchestrator.model.head import fate_of_head, redraw_head
from orchestrator.model.layers import keep_layers
from orchestrator.model.quantization import quantized_load
from orchestrator.model.tuning import apply_tuning
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    import torch


def build_model(spec: JobSpec, labels: tuple[str, ...], on_meta: bool = False) -> torch.nn.Module:
    """The model that is trained: loaded in fp32 (or on the meta device, without weights), then tuned.

    `on_meta` gives names, shapes and what is trainable at no cost; the planner counts with it.
    Raises OrchestratorError where the task cannot train this kind of model, or `tuning` hits nothing.
    """
    import torch
    import transformers

    config, head = load_config(spec, labels), fate_of_head(spec, labels)
    auto = getattr(transformers, spec.task.auto_class)
    extra = {} if spec.model.attention == "auto" else {"attn_implementation": spec.model.attention}

    def skeleton() -> Any:
        with torch.device("meta"):
            return auto.from_config(config, **extra)

    if on_meta:
        model = skeleton()
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    elif spec.model.pretrained is None:
        torch.manual_seed(spec.seed)
        model = auto.from_config(config, dtype=torch.float32, **extra)
    else:
        torch.manual_seed(spec.seed)  # a new head is drawn from it
        model = auto.from_pretrained(
            spec.model.pretrained,
            config=config,
            revision=spec.model.revision,
            dtype=torch.float32,
            # A classifier for other labels, or characters, keeps its body; its head is drawn anew.
            ignore_mismatched_sizes=not spec.task.all_logits,
            **_gguf(spec),
            **quantized_load(spec, skeleton),
            **extra,
        )
        if head == "new":
            redraw_head(model, spec.seed)
    if spec.model.keep_layers is not None:
        keep_layers(model, spec.model.keep_layers)
    _check_inputs(model, spec)
    if spec.gradient_checkpointing and not on_meta:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return apply_tuning(model, spec)


EXAMPLES = {
    "position_ids": "llama, gpt2 and qwen2",  # to keep documents and padding apart
    "input_values": "wav2vec2 and hubert",
}


def _check_inputs(model: Any, spec: JobSpec) -> None:
    from torch import nn

    taken = inspect.signature(type(model).forward).parameters
    mixing = next(
        (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)), None
    )
    if mixing is not None:
        raise OrchestratorError(
            f"model: {model.config.model_type} has batch norm, by which a row's result depends on the rows "
            "beside it and on the number of workers. Choose a model with layer norm, as vit and convnext are."
        )
    if why := spec.task.input_problem(model.config):
        raise OrchestratorError(f"model: {model.config.model_type} {why}")
    missing = [name for name in spec.task.required_inputs if name not in taken]
    if missing:
        raise OrchestratorError(
            f"model: {model.config.model_type} takes no {missing[0]}, which {spec.task.type} needs. "
            f"Choose a model that takes them, as {EXAMPLES[missing[0]]} do."
        )


def _gguf(spec: JobSpec) -> dict[str, Any]:
    """A GGUF stays quantised, and refuses training, unless it is told to dequantise."""
    if spec.model.gguf_file is None:
        return {}
    from transformers import GgufConfig

    name = spec.model.gguf_file
    return {"gguf_file": name, "quantization_config": GgufConfig(gguf_file=name, dequantize=True)}
