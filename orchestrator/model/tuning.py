"""A model as `tuning` says: parts frozen, or all of it, with adapters or virtual tokens through peft."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.parts import distances
from orchestrator.model.targets import (
    adaptable,
    endings,
    feed_forward,
    head_modules,
    keys_and_values,
    narrowed,
    whole_modules,
    without_experts,
)
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


def apply_tuning(model: Any, spec: JobSpec, new: frozenset[str] = frozenset()) -> torch.nn.Module:
    """Freeze, or wrap with adapters, as `tuning` says.

    `new`: parameters that the checkpoint did not hold. They are trained in any case, as random weights
    that stay as they are would be noise; `tuning.freeze` alone holds them.

    Raises OrchestratorError for names that match nothing, where nothing is left to train, and where
    the model cannot be tuned like that.
    """
    tuning = spec.tuning
    if isinstance(tuning, FullTuning):
        return _freeze(model, tuning, new)
    whole = _trained_whole(model, spec, new)
    match tuning:
        case LoraTuning():
            return _adapted(model, spec, _lora_config(model, tuning, whole.settings), whole)
        case IA3Tuning():
            return _adapted(model, spec, _ia3_config(model, tuning, whole.settings), whole)
        case PromptTuning():
            _check_prompt(model, spec)
            return _adapted(model, spec, _prompt_config(model, tuning, spec, whole), whole)
        case PrefixTuning():
            _check_prefix(model, spec)
            return _adapted(model, spec, _prefix_config(tuning, spec.task.peft_task, whole), whole)


def _freeze(model: torch.nn.Module, tuning: FullTuning, new: frozenset[str]) -> torch.nn.Module:
    names = [name for name, _ in model.named_parameters()]
    for pattern in tuning.freeze:
        if not fnmatch.filter(names, pattern):
            raise OrchestratorError(
                f"tuning.freeze: {pattern!r} matches no parameter. Some names: {', '.join(names[:4])}, …"
            )
    below = _below(names, tuning) - new
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


@dataclass(frozen=True)
class _Whole:
    """Parameters trained in full beside an adapter."""

    task_type: str
    """peft's kind of task; empty where it has none, or one that does not do."""
    modules: list[str]
    """The head, and modules that the checkpoint lacks."""
    loose: list[str]
    """Parameters that the checkpoint lacks, in modules that it holds otherwise."""

    @property
    def settings(self) -> dict[str, Any]:
        """As peft's configs take it."""
        kind = {"task_type": self.task_type} if self.task_type else {}
        return {**kind, "modules_to_save": list(self.modules)} if self.modules else kind


def _trained_whole(model: Any, spec: JobSpec, new: frozenset[str]) -> _Whole:
    """The head, unless it predicts tokens of the vocabulary, and all that is new.

    peft's own wrapper for question answering swallows `token_type_ids`, which a merged export gets.
    """
    kind = spec.task.peft_task
    heads = [] if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else head_modules(model)
    in_heads = [n for n in new if any(n.startswith(f"{head}.") for head in heads)]
    modules, loose = whole_modules(model, new.difference(in_heads))
    if loose and not getattr(spec.tuning, "merge_on_export", False):
        raise OrchestratorError(
            f"tuning.type = {spec.tuning.type!r}: the checkpoint lacks {loose[0]}, which an adapter exported by "
            "itself cannot hold. Use tuning.merge_on_export=true with tuning.type=lora, or tuning.type=full."
        )
    if modules and virtual_tokens(spec.tuning) and kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise OrchestratorError(
            f"tuning.type = {spec.tuning.type!r}: the checkpoint lacks {modules[0]}, which virtual tokens cannot "
            "stand in for. Use tuning.type=lora or tuning.type=full."
        )
    return _Whole("" if kind == "QUESTION_ANS" else kind, [*heads, *modules], loose)


def _adapted(model: Any, spec: JobSpec, config: Any, whole: _Whole) -> torch.nn.Module:
    from peft import get_peft_model

    if spec.gradient_checkpointing:
        model.enable_input_require_grads()
    parameters = dict(model.named_parameters())
    try:
        with warnings.catch_warnings():  # peft 0.21 reads a property that transformers 5 deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            tuned: Any = get_peft_model(model, config)
    except (ValueError, TypeError, OSError) as error:  # the last for a tokenizer that is not there
        if virtual_tokens(spec.tuning):
            raise OrchestratorError(f"tuning: {error}") from error
        raise OrchestratorError(
            f"tuning.target_modules: {error} Layers with a matrix here: {', '.join(_matrices(model))}."
        ) from error
    _show_convolutions(tuned)
    for name in whole.loose:
        parameters[name].requires_grad_(True)
    if words := tuned._modules.pop("word_embeddings", None):
        # peft registers the model's embeddings a second time, and checkpoints would hold them.
        tuned.__dict__["word_embeddings"] = words
    return tuned


def _show_convolutions(model: torch.nn.Module) -> None:
    """Give peft's wrappers of convolutions the sizes of what they wrap: MobileNet's code looks at them."""
    from torch.nn.modules.conv import _ConvNd

    for module in model.modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, _ConvNd):
            for name in ("stride", "kernel_size", "padding", "dilation", "groups"):
                module.__dict__.setdefault(name, getattr(inner, name))


def merged(model: Any) -> Any:
    """The plain model with its adapter folded in.

    peft's IA³ cannot let go of modules that are trained whole and hold several layers: they are put in place
    first.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            (trained,) = module.modules_to_save.values()
            setattr(model.get_submodule(parent), own, trained)
    return model.merge_and_unload()


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


def _lora_config(model: Any, lora: LoraTuning, head: dict[str, Any]) -> Any:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = lora.target_modules
    if targets in ("auto", "all-linear"):
        found = _adaptable(model)
        known = KNOWN.get(model.config.model_type, ()) if targets == "auto" else ()
        chosen = narrowed(found, known) or found
        if targets == "auto":
            chosen = without_experts(model, chosen)
        targets = tuple(endings(chosen, (name for name, _ in model.named_modules())))
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft takes floats, its hint says int
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        **head,
    )


def _ia3_config(model: Any, ia3: IA3Tuning, head: dict[str, Any]) -> Any:
    from peft import IA3Config
    from peft.utils import constants

    if ia3.target_modules != "auto":
        return IA3Config(
            target_modules=list(ia3.target_modules),
            feedforward_modules=list(ia3.feedforward_modules),
            **head,
        )
    kind, found = model.config.model_type, _adaptable(model)
    known = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, ())
    if chosen := narrowed(found, known):
        within = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, ())
        inputs = narrowed(chosen, within)
    else:
        inputs = feed_forward(found)
        chosen = {**keys_and_values(found), **inputs}
    names = [name for name, _ in model.named_modules()]
    outputs = [name for name in chosen if name not in inputs]
    scaled_inputs = endings(inputs, names)
    return IA3Config(
        target_modules=sorted({*endings(outputs, names), *scaled_inputs}),
        feedforward_modules=scaled_inputs,
        **head,
    )


def _adaptable(model: Any) -> dict[str, Any]:
    """Raises OrchestratorError where the model has no layer that an adapter can go on."""
    if found := adaptable(model):
        return found
    raise OrchestratorError(
        f"tuning.target_modules: {model.config.model_type} has no linear layer and no convolution in its body. "
        "Use tuning.type=full."
    )


def _prompt_config(model: Any, prompt: PromptTuning, spec: JobSpec, whole: _Whole) -> Any:
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
        modules_to_save=whole.modules or None,
        **begin,
    )


def _prefix_config(prefix: PrefixTuning, task_type: str, whole: _Whole) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=prefix.num_virtual_tokens,
        prefix_projection=prefix.prefix_projection,
        task_type=task_type,
        modules_to_save=whole.modules or None,
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
