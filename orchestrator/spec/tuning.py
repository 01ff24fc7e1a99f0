"""Kinds of tuning: all weights, some, or new ones beside the model's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.values import Frozen, by_type

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class FullTuning(Frozen):
    """The model's own weights move: all, but for those that `freeze` and `last_layers` leave out."""

    type: Literal["full"] = "full"
    freeze: tuple[str, ...] = ()
    """Glob patterns over parameter names (`*embeddings*`, `encoder.layer.[0-2].*`) kept as they are."""
    last_layers: Annotated[int, Field(ge=0)] | None = None
    """Only so many layers from the top move, and what follows them: the head. 0 is the head alone. Of
    an encoder and a decoder, the last ones of each. Output weights that are tied to the embeddings do not
    count as a head. Default: all layers and the embeddings."""
    unfreeze_every_steps: Count | Literal["epoch"] | None = None
    """Gradual unfreezing (ULMFiT: Howard & Ruder, arXiv 1801.06146, one layer an epoch): begin with the head
    and `last_layers` layers (here 0 by default) and let one more move after each so many steps, from the
    top; the embeddings come last. Memory is that of full tuning from the first step."""


class LoraTuning(Frozen):
    """Low-rank adapters through `peft` (Hu et al., arXiv 2106.09685); the base stays frozen."""

    type: Literal["lora"]
    r: Count = 8
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Share = 0.0
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear", "auto"] = "auto"
    """Module names that get adapters; `auto` takes peft's list for the architecture, or all linear layers of the
    model's stacks of layers. Heads, embeddings and routers get none; heads are trained whole."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    use_dora: bool = False
    """Tune the length of each weight vector apart from its direction, which the adapter turns (DoRA: Liu
    et al., arXiv 2402.09353). Slower; one more number per output of each adapted layer."""
    quantization: Literal["nf4"] | None = None
    """Hold the frozen linear layers in 4 bits (QLoRA: Dettmers et al., arXiv 2305.14314; NF4 with double
    quantization). Needs GPUs and the extra `qlora` (bitsandbytes). The export is merged into, or
    belongs to, the base as it was before: its figures may differ a little from training's."""
    merge_on_export: bool = True
    """Export one plain model with the update folded in; false exports the adapter alone."""


class IA3Tuning(Frozen):
    """Learned factors on keys, values and the feed-forward layer, through `peft` (IA³: Liu et al.,
    arXiv 2205.05638); the base stays frozen."""

    type: Literal["ia3"]
    target_modules: tuple[str, ...] | Literal["auto"] = "auto"
    """Module names whose outputs are scaled; `auto` takes peft's list for the architecture, or finds the layers
    that make keys and values and the ends of feed-forward blocks."""
    feedforward_modules: tuple[str, ...] | Literal["auto"] = "auto"
    """Those of `target_modules` whose inputs are scaled instead; `auto` as above."""
    merge_on_export: bool = True
    """Export one plain model with the factors folded in; false exports them alone."""


class PromptTuning(Frozen):
    """Learned embeddings in front of every text, through `peft` (Lester et al., arXiv 2104.08691); the base
    stays frozen."""

    type: Literal["prompt"]
    num_virtual_tokens: Count = 20
    """Number of virtual tokens; each row becomes longer by it."""
    init_text: str | None = None
    """They begin as the embeddings of this text, repeated or cut to fit. Default: of random tokens."""
    merge_on_export: bool = False
    """Not possible: the export is the adapter alone."""


class PrefixTuning(Frozen):
    """Learned keys and values in front of every text, in each layer, through `peft` (Li & Liang,
    arXiv 2101.00190); the base stays frozen."""

    type: Literal["prefix"]
    num_virtual_tokens: Count = 20
    """Number of virtual tokens; rows can be shorter by it at most."""
    prefix_projection: bool = False
    """Make them by two linear layers from smaller ones while training, as the paper does; the export holds
    what these give."""
    merge_on_export: bool = False
    """Not possible: the export is the adapter alone."""


TuningSpec = Annotated[
    Annotated[FullTuning, Tag("full")]
    | Annotated[LoraTuning, Tag("lora")]
    | Annotated[IA3Tuning, Tag("ia3")]
    | Annotated[PromptTuning, Tag("prompt")]
    | Annotated[PrefixTuning, Tag("prefix")],
    by_type("full"),
]


def quantized(tuning: TuningSpec) -> bool:
    """Tell whether the frozen base is held in 4 bits."""
    return isinstance(tuning, LoraTuning) and tuning.quantization is not None


def virtual_tokens(tuning: TuningSpec) -> int:
    """Positions of every row that learned tokens take."""
    return tuning.num_virtual_tokens if isinstance(tuning, PromptTuning | PrefixTuning) else 0
