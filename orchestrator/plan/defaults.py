"""Defaults and where they come from: every value that the job leaves open, with its source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from orchestrator.plan.memory import ModelFacts
from orchestrator.spec import JobSpec
from orchestrator.spec.optimizer import SGD, Adafactor, Adam, AdamW, Lion, RMSProp
from orchestrator.spec.tuning import IA3Tuning, LoraTuning, PrefixTuning, PromptTuning
from orchestrator.values import Frozen

SCRATCH_LR = (
    (125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (2.7e9, 1.6e-4), (6.7e9, 1.2e-4),
    (13e9, 1e-4), (175e9, 6e-5),
)  # fmt: skip
"""(parameters, learning rate) of GPT-3's models: Brown et al., arXiv 2005.14165, table 2.1."""
LION_SHARE = 0.2
"""Lion's rate as a share of AdamW's: Chen et al., arXiv 2302.06675, say 3 to 10 times less."""


class Default(Frozen):
    """A value that the job leaves open, and why it is that."""

    field: str
    value: str
    why: str


def learning_rate(spec: JobSpec, model: ModelFacts) -> tuple[float, str]:
    """(peak learning rate, its source); the source is empty for one that the job sets."""
    optimizer = spec.optimizer
    if optimizer.lr != "auto":
        return optimizer.lr, ""
    match optimizer:
        case AdamW() | Adam():
            return _adam_rate(spec, model)
        case RMSProp():
            rate, why = _adam_rate(spec, model)
            return rate, f"as for Adam, which is RMSProp with momentum: {why}"
        case Lion():
            rate, why = _adam_rate(spec, model)
            return rate * LION_SHARE, (
                "a fifth of AdamW's; Chen et al., arXiv 2302.06675, say 3 to 10 times less. "
                f"AdamW's: {why}"
            )
        case Adafactor() if isinstance(spec.tuning, IA3Tuning):
            return 3e-3, "Liu et al., arXiv 2205.05638, tuned IA³ with Adafactor at 3e-3"
        case Adafactor() if isinstance(spec.tuning, PromptTuning):
            return 0.3, "Lester et al., arXiv 2104.08691, tuned prompts with Adafactor at 0.3"
        case Adafactor():
            return 1e-3, "Raffel et al., arXiv 1910.10683, fine-tuned T5 with Adafactor at 1e-3"
        case SGD():
            return 1e-2, "a common start and no more: no source settles it; search optimizer.lr"


def _adam_rate(spec: JobSpec, model: ModelFacts) -> tuple[float, str]:
    if spec.model.pretrained is None:
        size, rate = min(SCRATCH_LR, key=lambda row: abs(row[0] - model.parameters))
        return rate, (
            f"new weights: GPT-3's rate for {size / 1e6:,.0f} M parameters, the nearest size "
            "(Brown et al., arXiv 2005.14165, table 2.1)"
        )
    match spec.tuning:
        case LoraTuning(quantization="nf4"):
            rate, sizes = (2e-4, "7B and 13B") if model.parameters < 20e9 else (1e-4, "33B and 65B")
            return rate, f"Dettmers et al., arXiv 2305.14314, tuned {sizes} with QLoRA at {rate:g}"
        case LoraTuning(use_dora=True):
            return 2e-4, "as for LoRA, of which DoRA is a variant: Hu et al., arXiv 2106.09685"
        case LoraTuning():
            return 2e-4, "adapters: Hu et al., arXiv 2106.09685, tuned GPT-3 with LoRA at 2e-4"
        case IA3Tuning():
            return 3e-3, "Liu et al., arXiv 2205.05638, tuned IA³ at 3e-3 (with Adafactor)"
        case PromptTuning():
            return (
                3e-2,
                "peft's guide to prompt tuning; Lester et al., arXiv 2104.08691, used Adafactor at 0.3",
            )
        case PrefixTuning():
            return 1e-2, "peft's guide to prefix tuning"
    if spec.task.type == "causal_lm":
        return 2e-5, "Touvron et al., arXiv 2307.09288, fine-tuned Llama 2 at 2e-5"
    return 5e-5, "the largest of 2e-5, 3e-5 and 5e-5 that Devlin et al., arXiv 1810.04805, advise"


def defaults(spec: JobSpec, lr: float, lr_source: str) -> tuple[Default, ...]:
    """Every value of how training goes that the job leaves open, with its source."""
    rows = [Default(field="optimizer.lr", value=f"{lr:.3g}", why=lr_source)] if lr_source else []
    return tuple(rows + list(_listed(spec)))


def _listed(spec: JobSpec) -> Iterator[Default]:
    for field, why in SOURCES.items():
        section, _, name = field.rpartition(".")
        owner: Any = getattr(spec, section) if section else spec
        kind, _, name = name.rpartition("/")
        if owner is None or (kind and owner.type != kind):
            continue
        if name in type(owner).model_fields and name not in owner.model_fields_set:
            field = f"{section}.{name}".lstrip(".")
            yield Default(field=field, value=_shown(getattr(owner, name)), why=why)


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "type", value))
    return "none" if value is None else str(value)


SOURCES: dict[str, str] = {
    "optimizer.type": "decoupled decay generalises better than Adam's: Loshchilov & Hutter, arXiv 1711.05101",
    "optimizer.adamw/betas": "Kingma & Ba, arXiv 1412.6980",
    "optimizer.adamw/weight_decay": "Devlin et al., arXiv 1810.04805, A.2, pre-trained BERT with 0.01",
    "optimizer.adam/betas": "Kingma & Ba, arXiv 1412.6980",
    "optimizer.sgd/momentum": "Sutskever et al., ICML 2013, and most work since",
    "optimizer.rmsprop/alpha": "torch's; Hinton's lecture 6e has 0.9",
    "optimizer.lion/betas": "Chen et al., arXiv 2302.06675",
    "optimizer.lion/weight_decay": "five times AdamW's: Chen et al., arXiv 2302.06675, say 3 to 10 times",
    "optimizer.adafactor/decay_rate": "Shazeer & Stern, arXiv 1804.04235",
    "optimizer.adafactor/clip_threshold": "Shazeer & Stern, arXiv 1804.04235",
    "schedule.type": "down to 0 in a straight line: Devlin et al., arXiv 1810.04805, A.2",
    "schedule.wsd/decay_ratio": "Hu et al., arXiv 2404.06395, found 10 % to be enough",
    "schedule.step/milestones": "half and three quarters: He et al., arXiv 1512.03385, 4.2, on CIFAR-10",
    "schedule.step/gamma": "He et al., arXiv 1512.03385",
    "distillation.temperature": "as in the code of DistilBERT (Sanh et al., arXiv 1910.01108)",
    "distillation.alpha": "even shares and no more: no source settles it; search it",
    "gradient_clipping": "Brown et al., arXiv 2005.14165, B, clip GPT-3's at 1.0",
    "tuning.lora/r": "Hu et al., arXiv 2106.09685, 7.2: small ranks are enough",
    "tuning.lora/lora_alpha": "twice r, a common choice; Hu et al., arXiv 2106.09685, keep it fixed",
    "tuning.lora/lora_dropout": "none unless asked for",
    "tuning.prompt/num_virtual_tokens": "Lester et al., arXiv 2104.08691, 3.2: little is gained beyond 20",
    "tuning.prefix/num_virtual_tokens": "as for prompts; Li & Liang, arXiv 2101.00190, took 10 to 200",
}
"""Field (`section.kind/name` where it depends on the kind) → where its default comes from."""
