"""A frozen base in 4 bits (QLoRA), through bitsandbytes on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.product import install_hint
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import LoraTuning, quantized


def quantized_load(spec: JobSpec, skeleton: Callable[[], Any]) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` loads the job's model in 4 bits; empty without quantization.

    `skeleton` gives the model without weights. Raises OrchestratorError without a GPU and without bitsandbytes.
    """
    if not quantized(spec.tuning):
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise OrchestratorError("tuning.quantization: 4-bit layers run on GPUs only; none is here.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OrchestratorError(
            f"tuning.quantization needs bitsandbytes: {install_hint('qlora')} on every node."
        )
    in_bf16 = spec.precision != "fp32" and torch.cuda.is_bf16_supported()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if in_bf16 else torch.float32,
        llm_int8_skip_modules=_whole_modules(skeleton()),  # bitsandbytes' name for 4 bits too
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def unquantized(spec: JobSpec) -> JobSpec:
    """The same job with its base as it was before: what its adapter is exported with."""
    if not isinstance(spec.tuning, LoraTuning):
        return spec
    tuning = spec.tuning.model_copy(update={"quantization": None})
    return spec.model_copy(update={"tuning": tuning})


def quantized_elements(model: Any) -> int:
    """Weights that `quantized_load` holds in 4 bits: those of the frozen linear layers of the model's body."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base = model.get_base_model()
    whole = set(_whole_modules(base))
    return sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not module.weight.requires_grad
        and not whole.intersection(name.split("."))
    )


def _whole_modules(model: Any) -> list[str]:
    """Names of what is not held in 4 bits: the head, and what the architecture wants in fp32.

    Left to itself, transformers spares the head of a language model alone.
    """
    children, body = dict(model.named_children()), model.base_model_prefix
    heads = {name for name in children if body in children and name != body}
    outputs = {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
    return sorted({*heads, *outputs, *(model._keep_in_fp32_modules or ())})
