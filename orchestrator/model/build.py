"""The model itself: weights or none, checked for what the task needs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.architectures import auto_class
from orchestrator.model.config import load_config, naming_packages
from orchestrator.model.embeddings import resize_embeddings
from orchestrator.model.generation import set_aside
from orchestrator.model.head import fate_of_head, redraw_head
from orchestrator.model.layers import keep_layers
from orchestrator.model.normalization import hold_statistics, norm_real_frames
from orchestrator.model.padded_audio import check_padding
from orchestrator.model.quantization import quantized_load
from orchestrator.model.targets import body_name, head_modules
from orchestrator.model.tuning import apply_tuning
from orchestrator.model.weights import CheckpointFit, checkpoint_fit, renamed_body
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    import torch


def build_model(spec: JobSpec, labels: tuple[str, ...], on_meta: bool = False) -> torch.nn.Module:
    """The model that is trained: loaded in fp32 (or on the meta device, without weights), then tuned.

    `on_meta` gives names, shapes and what is trainable at no cost; the planner counts with it.
    Raises OrchestratorError where the task cannot train this kind of model, or `tuning` hits nothing.
    """
    import torch

    config, head = load_config(spec, labels), fate_of_head(spec, labels)
    auto = auto_class(spec, config)
    extra = {} if spec.model.attention == "auto" else {"attn_implementation": spec.model.attention}

    def skeleton() -> Any:
        with torch.device("meta"), naming_packages():
            return auto.from_config(config, **extra)

    if on_meta:
        model = skeleton()
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    elif spec.model.pretrained is None:
        torch.manual_seed(spec.seed)
        with naming_packages():
            model = auto.from_config(config, dtype=torch.float32, **extra)
    else:
        torch.manual_seed(spec.seed)  # a new head is drawn from it
        model = auto.from_pretrained(
            spec.model.pretrained,
            config=config,
            revision=spec.model.revision,
            dtype=torch.float32,
            trust_remote_code=False,
            # A classifier for other labels, or characters, keeps its body; its head is drawn anew.
            ignore_mismatched_sizes=not spec.task.all_logits,
            key_mapping=renamed_body(type(skeleton())),
            **_gguf(spec),
            **quantized_load(spec, skeleton),
            **extra,
        )
        if head == "new":
            redraw_head(model, spec.seed)
    resize_embeddings(model, spec, on_meta)
    new = _new_parameters(model, checkpoint_fit(spec, config, type(model)), head == "new")
    if spec.model.keep_layers is not None:
        keep_layers(model, spec.model.keep_layers)
    hold_statistics(model, spec)
    norm_real_frames(model)
    _check_inputs(model, spec)
    if on_meta:
        if why := spec.task.forward_problem(model):
            raise OrchestratorError(f"model: {model.config.model_type} {why}.")
        check_padding(model, spec)
    if spec.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise OrchestratorError(
            f"gradient_checkpointing = true: {model.config.model_type} does not support it. Set it to false."
        )
    if spec.gradient_checkpointing and not on_meta:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_aside(model, spec)
    names = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in new)
    return apply_tuning(model, spec, names)


def _new_parameters(model: Any, fit: CheckpointFit, new_head: bool) -> set[int]:
    """Identities of the parameters that are drawn at random: names change where layers are dropped."""
    heads = tuple(f"{name}." for name in head_modules(model)) if new_head else ()
    return {
        id(parameter)
        for name, parameter in model.named_parameters()
        if name in fit.new or name.startswith(heads)
    }


def unfit(spec: JobSpec, labels: tuple[str, ...]) -> tuple[CheckpointFit, str]:
    """Return how the job's checkpoint fits its model, and the name of the model's body."""
    import torch

    config = load_config(spec, labels)
    with torch.device("meta"):
        model = auto_class(spec, config).from_config(config)
    return checkpoint_fit(spec, config, type(model)), body_name(model)


EXAMPLES = {
    "input_values": "wav2vec2 and hubert",
}


def _check_inputs(model: Any, spec: JobSpec) -> None:
    taken = inspect.signature(type(model).forward).parameters
    if why := spec.task.input_problem(model.config):
        raise OrchestratorError(f"model: {model.config.model_type} {why}")
    missing = [name for name in spec.task.required_inputs if name not in taken]
    if missing:
        raise OrchestratorError(
            f"model: {model.config.model_type} takes no {missing[0]}, which {spec.task.type} needs. "
            f"Choose a model that takes them, as {EXAMPLES[missing[0]]} do."
        )


def _gguf(spec: JobSpec) -> dict[str, Any]:
    """A GGUF stays quantized, and refuses training, unless it is told to dequantize."""
    if spec.model.gguf_file is None:
        return {}
    from transformers import GgufConfig

    name = spec.model.gguf_file
    return {"gguf_file": name, "quantization_config": GgufConfig(gguf_file=name, dequantize=True)}
