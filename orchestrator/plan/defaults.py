"""Defaults and where they come from: every value that the job leaves open, with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.plan.memory import ModelStats
from orchestrator.plan.settings import Setting, shown
from orchestrator.spec import JobSpec
from orchestrator.spec.optimizers.base import DefaultLr
from orchestrator.spec.tuning import IA3Tuning, LoraTuning, PrefixTuning, PromptTuning
from orchestrator.tasks.default_lr import nearest


def learning_rate(spec: JobSpec, model: ModelStats) -> tuple[float, str]:
    """(peak learning rate, its source); the source is empty for one that the job sets."""
    optimizer = spec.optimizer
    if optimizer.lr != "auto":
        return optimizer.lr, ""
    adam = DefaultLr(*_adam_rate(spec, model))
    return optimizer.default_lr(adam, spec.tuning.type)


def _adam_rate(spec: JobSpec, model: ModelStats) -> tuple[float, str]:
    task = spec.task
    if spec.model.pretrained is None:
        new = nearest(task.new_lrs, model.parameters)
        return new.lr, new.why
    match spec.tuning:
        case LoraTuning() if task.adapter_lr is not None:
            return task.adapter_lr.lr, task.adapter_lr.why
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
    tuned = task.default_tuned_lr(model.model_type)
    return tuned.lr, tuned.why


def defaults(spec: JobSpec, lr: float, lr_source: str) -> tuple[Setting, ...]:
    """Every value of how training goes that the job leaves open, with its source."""
    rows = [Setting(field="optimizer.lr", value=f"{lr:.3g}", why=lr_source)] if lr_source else []
    return tuple(rows + list(_listed(spec)))


def _listed(spec: JobSpec) -> Iterator[Setting]:
    averaging = spec.regularization.averaging
    kinds = [
        ("optimizer", spec.optimizer, spec.optimizer.sources),
        ("schedule", spec.schedule, spec.schedule.sources),
        ("regularization.averaging", averaging, averaging.sources),
    ]
    of_task = [("task", spec.task, spec.task.default_sources)]
    of_task += [(f"task.{name}", one, one.sources) for name, one in spec.task.sections.items()]
    for field, why in (_named(kinds) | SOURCES | _named(of_task)).items():
        section, _, name = field.rpartition(".")
        owner: Any = spec
        for part in filter(None, section.split(".")):
            owner = getattr(owner, part, None)
        kind, _, name = name.rpartition("/")
        if owner is None or (kind and owner.type != kind):
            continue
        if (
            name in type(owner).model_fields
            and not {name, INSTEAD.get(name)} & owner.model_fields_set
        ):
            field = f"{section}.{name}".lstrip(".")
            yield Setting(field=field, value=shown(getattr(owner, name)), why=why)


def _named(kinds: Sequence[tuple[str, Any, Mapping[str, str]]]) -> dict[str, str]:
    """Return `section.kind/name` → source, of (section, kind, its sources)."""
    return {
        f"{section}.{kind.type}/{name}": why
        for section, kind, sources in kinds
        for name, why in sources.items()
    }


INSTEAD = {"warmup_ratio": "warmup_steps"}
"""Field → another one that says the same in other words."""
SOURCES: dict[str, str] = {
    "distillation.temperature": "as in the code of DistilBERT (Sanh et al., arXiv 1910.01108)",
    "distillation.alpha": "even shares and no more: no source settles it; search it",
    "distillation.top_k": "a start and no more: no source settles it",
    "distillation.hidden.weight": "a start and no more: no source settles it",
    "gradient_clipping": "Brown et al., arXiv 2005.14165, B, clip GPT-3's at 1.0",
    "tuning.lora/r": "Hu et al., arXiv 2106.09685, 7.2: small ranks are enough",
    "tuning.lora/lora_alpha": "twice r, a common choice; Hu et al., arXiv 2106.09685, keep it fixed",
    "tuning.lora/lora_dropout": "none unless asked for",
    "tuning.prompt/num_virtual_tokens": "Lester et al., arXiv 2104.08691, 3.2: little is gained beyond 20",
    "tuning.prefix/num_virtual_tokens": "as for prompts; Li & Liang, arXiv 2101.00190, took 10 to 200",
}
"""Field (`section.kind/name` where it depends on the kind) → where its default comes from."""
