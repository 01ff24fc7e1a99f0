"""Architectures that have the head of a task."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec

EXAMPLES = 6
"""Models that an error names."""


def auto_class(spec: JobSpec, config: Any) -> Any:
    """The `transformers` auto class of the job's task.

    Raises OrchestratorError, naming models that have it, where the job's model lacks the task's head.
    """
    import transformers

    auto = getattr(transformers, spec.task.auto_class)
    if type(config) in auto._model_mapping.keys():  # noqa: SIM118, lazy: `in` alone would miss it
        return auto
    raise OrchestratorError(
        f"model: transformers has no {config.model_type} for {spec.task.type} ({spec.task.auto_class}). "
        f"Models that have it: {', '.join(models_for(auto))}, …"
    )


def models_for(auto: Any) -> list[str]:
    """Types of models that an auto class builds: those with the most other heads, which are the most used.

    As causal language models, without those that are pretrained to see both sides of a word.
    """
    from transformers.models.auto import modeling_auto

    mappings = [m for name, m in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    known = set(auto._model_mapping._model_mapping)
    if known == set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        known -= set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return sorted(sorted(known), key=lambda kind: -sum(kind in mapping for mapping in mappings))[
        :EXAMPLES
    ]
