"""A model as `tuning` says: parts frozen, or all of it, with adapters or virtual tokens through peft."""

from __future__ import annotations

import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.parts import distances
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import (
    FullTuning,
    IA3Tuning,
    LoraTuning,
    PrefixTuning,
    PromptTuning,
    virtual_tokens,
)

if TYPE_CHECKING:
    import torch


def apply_tuning(model: Any, spec: JobSpec) -> torch.nn.Module:
    """Freeze, or wrap with adapters, as `tuning` says.

    Raises OrchestratorError for names that match nothing, where nothing is left to train, and where
    the model cannot be tuned like that.
    """
    match spec.tuning:
        case FullTuning() as full:
            return _freeze(model, full)
        case LoraTuning() as lora:
            return _adapted(model, spec, _lora_config(model, lora, _head(model, spec)))
        case IA3Tuning() as ia3:
            return _adapted(model, spec, _ia3_config(ia3, _head(model, spec)))
        case PromptTuning() as prompt:
            _check_prompt(model, spec)
            return _adapted(model, spec, _prompt_config(model, prompt, spec))
        case PrefixTuning() as prefix:
            _check_prefix(model, spec)
            return _adapted(model, spec, _prefix_config(prefix, spec.task.peft_task))


def _freeze(model: torch.nn.Module, tuning: FullTuning) -> torch.nn.Module:
    names = [name for name, _ in model.named_parameters()]
    for pattern in tuning.freeze:
        if not fnmatch.filter(names, pattern):
            raise OrchestratorError(
                f"tuning.freeze: {pattern!r} matches no parameter. Some names: {', '.join(names[:4])}, …"
            )
    below = _below(names, tuning)
    for name, parameter in model.named_parameters():
        if name in below or any(fnmatch.fnmatch(name, pattern) for pattern in tuning.freeze):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise OrchestratorError(
            "tuning leaves nothing to train: narrow tuning.freeze, or raise tuning.last_layers."
        )
    return model


def _below(names: list[str], tuning: FullTuning) -> set[str]:
    """Parameters below `last_layers`, where those are all that ever moves."""
    if tuning.unfreeze_every_steps is not None:
        distances(names, "tuning.unfreeze_every_steps")  # raises where there are no layers
        return set()
    if tuning.last_layers is None:
        return set()
    found = distances(names, "tuning.last_layers")
    layers = max(found.values()) - 1
    if tuning.last_layers > layers:
        raise OrchestratorError(
            f"tuning.last_layers = {tuning.last_layers}: the model has {layers} layers. Drop it to tune all."
        )
    return {name for name, distance in found.items() if distance > tuning.last_layers}


def _adapted(model: Any, spec: JobSpec, config: Any) -> torch.nn.Module:
    from peft import get_peft_model

    if spec.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        tuned: Any = get_peft_model(model, config)
    except (ValueError, OSError) as error:  # the latter for a tokenizer that is not there
        if virtual_tokens(spec.tuning):
            raise OrchestratorError(f"tuning: {error}") from error
        raise OrchestratorError(
            f"tuning.target_modules: {error} Layers with a matrix here: {', '.join(_matrices(model))}."
        ) from error
    if words := tuned._modules.pop("word_embeddings", None):
        # peft registers the model's embeddings a second time, and checkpoints would hold them.
        tuned.__dict__["word_embeddings"] = words
    return tuned


def _matrices(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of modules whose weight is a matrix, embeddings aside."""
    from torch import nn

    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if not isinstance(module, nn.Embedding)
            and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
            and weight.dim() == 2
        }
    )


def _head(model: Any, spec: JobSpec) -> dict[str, Any]:
    """What tells peft to keep the head trainable: the kind of task, or the head's modules by name.

    It has no kinds for images and sound. Its own wrapper for question answering swallows
    `token_type_ids`, which a merged export gets.
    """
    if spec.task.peft_task not in ("", "QUESTION_ANS"):
        return {"task_type": spec.task.peft_task}
    beside = {name: m for name, m in model.named_children() if name != model.base_model_prefix}
    return {"modules_to_save": [n for n, m in beside.items() if any(True for _ in m.parameters())]}


def _lora_config(model: Any, lora: LoraTuning, head: dict[str, Any]) -> Any:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = lora.target_modules
    if targets == "auto":
        known = KNOWN.get(model.config.model_type)
        targets = tuple(known) if known else "all-linear"
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft takes floats, its hint says int
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        **head,
    )


def _ia3_config(ia3: IA3Tuning, head: dict[str, Any]) -> Any:
    from peft import IA3Config

    if ia3.target_modules == "auto":
        return IA3Config(**head)
    return IA3Config(
        target_modules=list(ia3.target_modules),
        feedforward_modules=list(ia3.feedforward_modules),
        **head,
    )


def _prompt_config(model: Any, prompt: PromptTuning, spec: JobSpec) -> Any:
    """Sizes are given, as peft knows not every architecture's names for them."""
    from peft import PromptTuningConfig

    begin: dict[str, Any] = {"prompt_tuning_init": "SAMPLE_VOCAB"}
    if prompt.init_text is not None:
        own = {"revision": spec.model.revision, "gguf_file": spec.model.gguf_file}
        begin = {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": prompt.init_text,
            "tokenizer_name_or_path": spec.model.tokenizer or spec.model.pretrained,
            "tokenizer_kwargs": {k: v for k, v in own.items() if v and not spec.model.tokenizer},
        }
    text = model.config.get_text_config()
    return PromptTuningConfig(
        num_virtual_tokens=prompt.num_virtual_tokens,
        token_dim=model.get_input_embeddings().embedding_dim,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        task_type=spec.task.peft_task,
        **begin,
    )


def _prefix_config(prefix: PrefixTuning, task_type: str) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=prefix.num_virtual_tokens,
        prefix_projection=prefix.prefix_projection,
        task_type=task_type,
    )


def _check_prompt(model: Any, spec: JobSpec) -> None:
    """A head that looks for a text's last token among `input_ids` gets embeddings, and takes padding for it."""
    ends = hasattr(model, "score") or model.config.is_encoder_decoder
    if spec.task.peft_task == "SEQ_CLS" and ends:
        raise OrchestratorError(
            f"tuning.type = 'prompt': {model.config.model_type} predicts from a text's last token, which it "
            "does not find behind virtual tokens. Use tuning.type: prefix or lora, or an encoder as bert."
        )


def _check_prefix(model: Any, spec: JobSpec) -> None:
    """peft hands the keys and values over as `past_key_values`; many encoders know nothing of them."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    taken = any("past_key_values" in inspect.signature(m.forward).parameters for m in (model, body))
    of_encoder = spec.task.peft_task != "SEQ_2_SEQ_LM" and model.config.is_encoder_decoder
    if of_encoder or not taken:
        raise OrchestratorError(
            f"tuning.type = 'prefix': {model.config.model_type} takes no past_key_values "
            f"for {spec.task.type}. Use tuning.type: lora or ia3."
        )
