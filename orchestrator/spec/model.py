"""Which model is tuned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.values import Frozen

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
    dropout: Probability | Annotated[dict[str, Probability], Field(min_length=1)] | None = None
    """Sets every dropout probability of the model's config, or those named
    (`{hidden_dropout_prob: 0.2}`). Default: the config's own."""
    keep_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = (
        None
    )
    """Numbers, from 0, of the pretrained layers that stay; all others are dropped before training
    (`[0, 2, 4]` of six: Sanh et al., arXiv 1910.01108, begin DistilBERT so)."""
