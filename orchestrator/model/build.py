"""The model itself: weights or none, frozen parts, adapters."""

from __future__ import annotations

import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config
from orchestrator.model.head import fate_of_head, redraw_head
from orchestrator.spec import JobSpec
from orchestrator.spec.model import FullTuning, LoraTuning

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
    if on_meta:
        with torch.device("meta"):
            model = auto.from_config(config, **extra)
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
            # A classifier for other labels keeps its body; its head is drawn anew.
            ignore_mismatched_sizes=spec.task.labelled_head,
            **_gguf(spec),
            **extra,
        )
        if head == "new":
            redraw_head(model, spec.seed)
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


def apply_tuning(model: Any, spec: JobSpec) -> torch.nn.Module:
    """Freeze, or wrap with adapters, as `tuning` says.

    Raises OrchestratorError for a freeze pattern that matches nothing, or that leaves nothing to train.
    """
    match spec.tuning:
        case FullTuning(freeze=patterns):
            return _freeze(model, patterns)
        case LoraTuning() as lora:
            return _add_lora(model, lora, spec)


def _freeze(model: torch.nn.Module, patterns: tuple[str, ...]) -> torch.nn.Module:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise OrchestratorError(
                f"tuning.freeze: {pattern!r} matches no parameter. Some names: {', '.join(names[:4])}, …"
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise OrchestratorError("tuning.freeze leaves nothing to train: narrow its patterns.")
    return model


def _add_lora(model: Any, lora: LoraTuning, spec: JobSpec) -> torch.nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = lora.target_modules
    if targets == "auto":
        known = KNOWN.get(model.config.model_type)
        targets = tuple(known) if known else "all-linear"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft takes floats, its hint says int
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        task_type=TaskType[spec.task.peft_task],
    )
    if spec.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise OrchestratorError(f"tuning.target_modules: {error}") from error
