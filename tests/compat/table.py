"""The table: which architectures, which tasks, which tuning, and whether each cell works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compat.architectures import (
    ALBERT,
    BART,
    BEIT,
    BERT,
    BIGBIRD,
    BIOGPT,
    BLOOM,
    CAMEMBERT,
    COHERE,
    CONVNEXT,
    DEBERTA,
    DEEPSEEK_V3,
    DEIT,
    DINOV2,
    DISTILBERT,
    EFFICIENTNET,
    ELECTRA,
    FALCON,
    FUNNEL,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    GPT_OSS,
    GPTJ,
    GRANITE,
    GRANITE4,
    HUBERT,
    LED,
    LEVIT,
    LFM2,
    LLAMA,
    LLAMA3,
    LONGFORMER,
    MAMBA,
    MARIAN,
    MBART,
    MISTRAL,
    MIXTRAL,
    MOBILENET,
    MOBILEVIT,
    MODERNBERT,
    MPNET,
    MPT,
    MT5,
    OLMO2,
    OPT,
    PEGASUS,
    PHI,
    PHI3,
    PVT,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    REGNET,
    RESNET,
    ROBERTA,
    SEGFORMER,
    SMOLLM3,
    STABLELM,
    STARCODER2,
    SWIN,
    T5,
    VIT,
    WAV2VEC2,
    WAV2VEC2_GROUP,
    WAVLM,
    WHISPER,
    XGLM,
    XLMR,
    XLNET,
    Architecture,
)


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    architecture: Architecture
    task: str
    """A name in `tasks.CASES`."""
    tuning: str = "full"
    """A name in `TUNINGS`."""
    refused: bool = False
    """The product refuses it with a reason; otherwise it works."""

    @property
    def name(self) -> str:
        """The cell in words; unique."""
        return f"{self.architecture.name}, {self.task}, {self.tuning}"


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "LoRA": {"type": "lora"},
    "LoRA apart": {"type": "lora", "merge_on_export": False},
    "DoRA": {"type": "lora", "use_dora": True},
    "IA³": {"type": "ia3"},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "last layer": {"type": "full", "last_layers": 1},
}


def _cells() -> Iterator[Cell]:
    """All cells, family by family."""
    yield from _encoders()
    yield from _classifying_decoders()
    yield from _language_models()
    yield from _translators()
    yield from _images_and_sound()


def _encoders() -> Iterator[Cell]:
    classify, tag, ask = "text classification", "token classification", "question answering"
    everywhere = (
        BERT,
        ROBERTA,
        DISTILBERT,
        ALBERT,
        ELECTRA,
        DEBERTA,
        MODERNBERT,
        XLNET,
        MPNET,
        CAMEMBERT,
    )
    for one in everywhere:
        yield Cell(one, classify)
        yield Cell(one, classify, "LoRA")
    for one in (BERT, ROBERTA, DEBERTA, MODERNBERT, XLMR):
        yield Cell(one, tag)
    for one in (BERT, ROBERTA, DISTILBERT, ALBERT, DEBERTA, MODERNBERT, XLNET, CAMEMBERT):
        yield Cell(one, tag, "LoRA")
    for one in (BERT, ROBERTA, DISTILBERT, DEBERTA, LONGFORMER):
        yield Cell(one, ask)
    for one in (BERT, ALBERT, ELECTRA):
        yield Cell(one, ask, "LoRA")
    for one in (XLMR, LONGFORMER, BIGBIRD, FUNNEL):
        yield Cell(one, classify)
    for task in ("regression", "multi-label classification"):
        for one in (BERT, DISTILBERT, DEBERTA):
            yield Cell(one, task)
        yield Cell(ROBERTA, task, "LoRA")
    yield Cell(BERT, classify, "IA³")
    yield Cell(ROBERTA, classify, "DoRA")
    yield Cell(BERT, classify, "prefix")
    yield Cell(BERT, classify, "prompt")
    yield Cell(DISTILBERT, classify, "last layer")
    yield Cell(BERT, "causal LM", refused=True)


def _classifying_decoders() -> Iterator[Cell]:
    classify = "text classification"
    for one in (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, PHI, OPT, BLOOM, GPT_NEOX):
        yield Cell(one, classify)
    for one in (GPT2, LLAMA, QWEN3, GEMMA3):
        yield Cell(one, classify, "LoRA")
    yield Cell(BART, classify)
    yield Cell(BART, classify, "LoRA")
    yield Cell(QWEN2, "regression", "LoRA")
    yield Cell(LLAMA3, "token classification", "LoRA")
    yield Cell(GPT2, "token classification")
    yield Cell(QWEN3, "question answering", "LoRA")
    yield Cell(OPT, "token classification", refused=True)
    yield Cell(GEMMA3, "question answering", refused=True)


def _language_models() -> Iterator[Cell]:
    plain = (
        GPT2, LLAMA, LLAMA3, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OLMO2,
        GRANITE, GRANITE4, GPT_NEOX, GPTJ, GPT_NEO, BLOOM, FALCON, OPT, XGLM, BIOGPT, GPT_OSS, STABLELM, COHERE,
        DEEPSEEK_V3, SMOLLM3, STARCODER2, MPT, MAMBA, LFM2, QWEN3_NEXT,
    )  # fmt: skip
    for one in plain:
        yield Cell(one, "causal LM")
    for one in (LLAMA, QWEN3, MISTRAL, GEMMA2, GPT_OSS, GRANITE4, PHI3, GPT2):
        yield Cell(one, "causal LM", "LoRA")
    for one in (LLAMA3, QWEN3, GEMMA3, PHI3, SMOLLM3):
        yield Cell(one, "chat")
    for one in (QWEN2, QWEN3_MOE, GEMMA):
        yield Cell(one, "chat", "LoRA")
    for one in (LLAMA, GPT2, OPT, FALCON):
        yield Cell(one, "instructions")
    yield Cell(QWEN2, "instructions", "LoRA apart")
    yield Cell(LLAMA, "causal LM", "IA³")
    yield Cell(LLAMA3, "causal LM", "prefix")
    for one in (LLAMA3, QWEN2, GPT2):
        yield Cell(one, "preference")
    for one in (QWEN3, GEMMA2, MIXTRAL):
        yield Cell(one, "preference", "LoRA")
    for one in (LLAMA3, QWEN2, GPT2, BERT):
        yield Cell(one, "reward model")
    for one in (QWEN3, GEMMA2, DEBERTA):
        yield Cell(one, "reward model", "LoRA")


def _translators() -> Iterator[Cell]:
    for one in (T5, MT5, BART, MBART, PEGASUS, MARIAN, LED):
        yield Cell(one, "sequence to sequence")
    for one in (T5, BART, MBART):
        yield Cell(one, "sequence to sequence", "LoRA")
    yield Cell(T5, "sequence to sequence", "IA³")
    yield Cell(T5, "text classification")


def _images_and_sound() -> Iterator[Cell]:
    images = (
        VIT, DEIT, BEIT, SWIN, CONVNEXT, SEGFORMER, PVT, DINOV2, RESNET, MOBILENET, EFFICIENTNET, REGNET, MOBILEVIT,
        LEVIT,
    )  # fmt: skip
    for one in images:
        yield Cell(one, "image classification")
    for one in (VIT, SWIN, CONVNEXT, RESNET):
        yield Cell(one, "image classification", "LoRA")
    for one in (WAV2VEC2, HUBERT, WAVLM):
        yield Cell(one, "speech recognition")
    yield Cell(WAV2VEC2_GROUP, "speech recognition")
    yield Cell(WAV2VEC2, "speech recognition", "LoRA")
    yield Cell(WHISPER, "speech recognition", refused=True)


CELLS: tuple[Cell, ...] = tuple(_cells())
