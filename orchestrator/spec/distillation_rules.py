"""Rules about learning from a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import Problem
from orchestrator.spec.job import JobSpec
from orchestrator.spec.tuning import PromptTuning


def distillation_rules(spec: JobSpec) -> Iterator[Problem]:
    """Every rule of the distillation section that `spec` breaks; none where there is no such section."""
    settings, task = spec.distillation, spec.task
    if settings is None:
        return
    if task.soft_targets is None:
        why = f"needs a prediction per class, token or number, and {task.type} makes none: {task.no_soft_targets}"
        fix = "drop it; classification, text_regression, seq2seq and causal_lm can learn from a teacher"
        yield Problem("distillation", why, fix)
        return
    if settings.alpha == 0 and settings.hidden is None:
        why = "takes nothing from the teacher, and there is no distillation.hidden either"
        yield Problem("distillation.alpha", why, "alpha: 0.5, or drop the section", 0)
    if "top_k" in settings.model_fields_set and task.soft_targets != "tokens":
        why = "has no effect: all outputs are stored but those of language models"
        yield Problem("distillation.top_k", why, "drop it", settings.top_k)
    if settings.hidden is not None and not task.reads_text:
        why = f"compares hidden states token by token, and {task.type} reads no text"
        yield Problem(
            "distillation.hidden", why, "drop it: the outputs are learned from without it"
        )
    if settings.hidden is not None and isinstance(spec.tuning, PromptTuning):
        why = "excludes tuning.type: prompt: the student's rows would be longer than the teacher's"
        yield Problem("distillation.hidden", why, "drop it, or another tuning.type")
    for field in ("mixup_alpha", "r_drop_alpha"):
        if (value := getattr(spec.regularization, field)) is not None:
            why = "excludes distillation: the teacher was asked about every row as it is, once"
            yield Problem(f"regularization.{field}", why, "keep one of the two", value)
