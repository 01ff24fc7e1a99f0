"""Default learning rates by kind of task, each with its citation. For Adam's family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """A peak learning rate, and where it comes from."""

    lr: float
    why: str


BY_SIZE = Sequence[tuple[float, Rate]]
"""(parameters, rate) of the models that a paper trained."""

_T5 = Rate(1e-4, "transformers' page on T5: 1e-4 to 3e-4 work well with AdamW")
T5_FAMILY: Mapping[str, Rate] = dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5)

TEXT_TUNED: Mapping[str, Rate] = {
    "": Rate(5e-5, "the largest of 2e-5, 3e-5 and 5e-5 that Devlin et al., arXiv 1810.04805, advise for BERT"),
    **T5_FAMILY,
}  # fmt: skip
"""model_type → rate for a pretrained model; "" for all others."""
LM_TUNED: Mapping[str, Rate] = {
    "": Rate(2e-5, "Touvron et al., arXiv 2307.09288, fine-tuned Llama 2 at 2e-5")
}
DPO_TUNED: Mapping[str, Rate] = {"": Rate(1e-6, "Rafailov et al., arXiv 2305.18290, B, used 1e-6")}
DPO_ADAPTED = Rate(
    5e-6, "Hugging Face's alignment handbook tuned Zephyr 7B by DPO with LoRA at 5e-6"
)
SEQ2SEQ_TUNED: Mapping[str, Rate] = {
    "": Rate(3e-5, "fairseq's recipe for BART, and Liu et al., arXiv 2001.08210, for mBART"),
    **T5_FAMILY,
}
IMAGE_TUNED: Mapping[str, Rate] = {
    "": Rate(5e-5, "transformers' guide to image classification tunes ViT at 5e-5")
}
SPEECH_TUNED: Mapping[str, Rate] = {
    "": Rate(3e-5, "fairseq's recipe for wav2vec 2.0 Base on 100 hours")
}

TEXT_NEW: BY_SIZE = [
    (size, Rate(lr, f"new weights: Liu et al., arXiv 1907.11692, pre-trained RoBERTa {name} at {lr:g}"))
    for size, lr, name in ((125e6, 6e-4, "base"), (355e6, 4e-4, "large"))
]  # fmt: skip
LM_NEW: BY_SIZE = [
    (size, Rate(lr, f"new weights: GPT-3's rate for {size / 1e6:,.0f} M parameters, the nearest size "
     "(Brown et al., arXiv 2005.14165, table 2.1)"))
    for size, lr in (
        (125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (2.7e9, 1.6e-4), (6.7e9, 1.2e-4),
        (13e9, 1e-4), (175e9, 6e-5),
    )
]  # fmt: skip
SEQ2SEQ_NEW: BY_SIZE = [
    (size, Rate(lr, f"new weights: the peak of the {name} Transformer's schedule, warmed up over 4,000 steps "
     "(Vaswani et al., arXiv 1706.03762, 5.3)"))
    for size, lr, name in ((65e6, 7e-4, "base"), (213e6, 5e-4, "big"))
]  # fmt: skip
IMAGE_NEW: BY_SIZE = [
    (86e6, Rate(5e-4, "new weights: Touvron et al., arXiv 2012.12877, trained DeiT at 5e-4 for each 512 images a step"))
]  # fmt: skip
SPEECH_NEW: BY_SIZE = [
    (size, Rate(lr, f"new weights: Baevski et al., arXiv 2006.11477, pre-trained wav2vec 2.0 {name} at {lr:g}"))
    for size, lr, name in ((95e6, 5e-4, "Base"), (317e6, 3e-4, "Large"))
]  # fmt: skip


def nearest(table: BY_SIZE, parameters: int) -> Rate:
    """The rate of the model whose size is nearest."""
    return min(table, key=lambda row: abs(row[0] - parameters))[1]
