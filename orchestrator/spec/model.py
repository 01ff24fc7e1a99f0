"""Which model is tuned, and which of its weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from orchestrator.values import Frozen, by_type

Probability = Annotated[float, Field(ge=0, lt=1)]


class ModelSpec(Frozen):
    """A Hugging Face model: pretrained (hub id or local folder), or from a config."""

    pretrained: str | None = None
    """Hub id (`org/name`) or local folder with weights. Exactly one of `pretrained` and `config`."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Pin it for a run that can be repeated."""
    gguf_file: str | None = None
    """File name of a GGUF inside `pretrained`; it is dequantised on load, so that it trains."""
    config: dict[str, Any] | None = None
    """A `transformers` config (`model_type` and its fields): random weights, training from scratch."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer. Default: the one beside `pretrained`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel, passed to `transformers` as `attn_implementation`; `auto` lets it choose."""
    dropout: Probability | dict[str, Probability] | None = None
    """Sets every dropout probability of the model's config, or those named
    (`{hidden_dropout_prob: 0.2}`). Default: the config's own."""


class FullTuning(Frozen):
    """Every weight moves, but those that `freeze` names."""

    type: Literal["full"] = "full"
    freeze: tuple[str, ...] = ()
    """Glob patterns over parameter names (`*embeddings*`, `encoder.layer.[0-2].*`) kept as they are."""


class LoraTuning(Frozen):
    """Low-rank adapters through `peft` (Hu et al., arXiv 2106.09685); the base stays frozen."""

    type: Literal["lora"]
    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear", "auto"] = "auto"
    """Module names that get adapters; `auto` takes peft's list for the architecture, or all linear layers."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    merge_on_export: bool = True
    """Export one plain model with the update folded in; false exports the adapter alone."""


TuningSpec = Annotated[
    Annotated[FullTuning, Tag("full")] | Annotated[LoraTuning, Tag("lora")], by_type("full")
]
