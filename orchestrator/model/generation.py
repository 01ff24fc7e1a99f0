"""Settings of a checkpoint that shape what it writes: made for its old task, they distort figures of a new one."""

from __future__ import annotations

from typing import Any

from orchestrator.spec import JobSpec

SHAPING = (
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "exponential_decay_length_penalty", "diversity_penalty",
    "num_beam_groups", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "stop_strings",
    "max_time", "guidance_scale",
)  # fmt: skip
"""Fields of a `GenerationConfig` that forbid or favor words and lengths. Tokens that begin or end a text are not among
them: they belong to the architecture."""
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "length_penalty": 1.0, "num_beam_groups": 1}
"""Values that change nothing, beside 0 and none."""


def set_aside(model: Any, spec: JobSpec) -> None:
    """Unset the shaping settings of the model, where the job's evaluations have it write and do not keep them.

    The export then writes as the evaluations did.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or keeps(spec):
        return
    for name in shaping(settings):
        setattr(settings, name, None)


def keeps(spec: JobSpec) -> bool:
    """Tell whether the checkpoint's settings stay as they are."""
    return bool(getattr(spec.task, "keep_generation_settings", True))


def shaping(settings: Any) -> dict[str, Any]:
    """The shaping settings of a `GenerationConfig` that change something, by name."""
    found = {name: getattr(settings, name, None) for name in SHAPING}
    return {name: value for name, value in found.items() if value and value != NEUTRAL.get(name)}


def checkpoint_settings(spec: JobSpec) -> dict[str, Any]:
    """The shaping settings that the job's checkpoint comes with."""
    from transformers import GenerationConfig

    if spec.model.pretrained is None or spec.model.gguf_file is not None:
        return {}
    for file in ("generation_config.json", "config.json"):  # the latter in older checkpoints
        try:
            found = GenerationConfig.from_pretrained(
                spec.model.pretrained, file, revision=spec.model.revision or "main"
            )
        except (OSError, ValueError):
            continue
        return shaping(found)
    return {}
