"""The model that is tuned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.spec.paths import PathText
from orchestrator.values import Frozen

Probability = Annotated[float, Field(ge=0, lt=1)]
WEIGHTS = Affects(Effect.ROWS, Effect.MODEL, Effect.CHECKPOINT, Effect.TRAINING, names_content=True)


class ModelSpec(Frozen):
    """A Hugging Face model: pretrained (hub id or local folder), or from a config."""

    pretrained: Annotated[PathText | None, WEIGHTS] = None
    """Hub id (`org/name`) or local folder with weights. Exactly one of `pretrained` and `config`."""
    revision: Annotated[str | None, WEIGHTS] = None
    """Branch, tag or commit on the hub. Pin it for a run that can be repeated."""
    gguf_file: str | None = None
    """File name of a GGUF inside `pretrained`; it is dequantized on load, so that it trains."""
    config: dict[str, Any] | None = None
    """A `transformers` config (`model_type` and its fields): random weights, training from scratch."""
    tokenizer: Annotated[PathText | None, WEIGHTS] = None
    """Hub id or folder of the tokenizer. Default: the one beside `pretrained`."""
    chat_template: PathText | None = None
    """File with a Jinja chat template, used and exported in place of the tokenizer's own."""
    resize_embeddings: bool = False
    """Give tokens of the tokenizer that the model does not embed rows of their own, which are trained. Needed
    only where rows use such tokens."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel, passed to `transformers` as `attn_implementation`; `auto` lets it choose."""
    dropout: Probability | Annotated[dict[str, Probability], Field(min_length=1)] | None = None
    """Sets every dropout probability of the model's config, or those named
    (`{hidden_dropout_prob: 0.2}`). Default: the config's own."""
    batch_norm: Literal["auto", "frozen"] = "auto"
    """`frozen`: batch norm uses the running statistics that the model begins with, which stay as they are; scale
    and shift are trained. `auto`: `frozen` for a pretrained model; new weights have no statistics and are refused
    (`frozen` gives them mean 0 and variance 1)."""
    keep_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = (
        None
    )
    """Numbers, from 0, of the pretrained layers that stay; all others are dropped before training
    (`[0, 2, 4]` of six: Sanh et al., arXiv 1910.01108, begin DistilBERT so)."""
