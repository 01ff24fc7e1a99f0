"""Rules across fields about which weights move."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import Problem
from orchestrator.spec.job import JobSpec
from orchestrator.spec.tuning import (
    FullTuning,
    IA3Tuning,
    LoraTuning,
    PrefixTuning,
    PromptTuning,
)

NO_GPU = "4-bit layers (the extra `qlora`: bitsandbytes) run on GPUs only, and workers have none"


def tuning_rules(spec: JobSpec) -> Iterator[Problem]:
    """Every rule about `tuning` that `spec` breaks."""
    tuning = spec.tuning
    if spec.model.resize_embeddings:
        yield from _resized(spec)
    if isinstance(tuning, FullTuning):
        return
    if spec.model.config is not None:
        why = "adapters on random weights learn nothing useful"
        yield Problem("tuning.type", why, "use model.pretrained, or tuning.type: full", tuning.type)
    if not spec.task.reads_text and isinstance(tuning, PromptTuning | PrefixTuning):
        why = f"stands in front of a text, which {spec.task.type} does not read"
        yield Problem("tuning.type", why, "tuning.type: lora, ia3 or full", tuning.type)
    match tuning:
        case LoraTuning(quantization=kind) if kind is not None:
            yield from _quantized(spec, kind)
        case IA3Tuning(target_modules=targets, feedforward_modules=within):
            yield from _ia3(targets, within)
        case PromptTuning() | PrefixTuning():
            yield from _virtual_tokens(spec, tuning)


def _resized(spec: JobSpec) -> Iterator[Problem]:
    field = "model.resize_embeddings"
    if not spec.task.reads_text:
        yield Problem(field, f"{spec.task.type} reads no text", "drop it", True)
    if not isinstance(spec.tuning, FullTuning):
        why = f"adds rows that tuning.type: {spec.tuning.type} would leave untrained"
        yield Problem(field, why, "tuning.type: full, or drop it", True)


def _quantized(spec: JobSpec, kind: str) -> Iterator[Problem]:
    field, zero = "tuning.quantization", spec.zero
    if spec.resources.gpus_per_worker == 0:
        yield Problem(field, NO_GPU, "drop it, or give workers a GPU", kind)
    if zero.stage == 3 or zero.offload_param == "cpu":
        why = "cuts up every weight, and blocks of 4 bits are held whole"
        name = "zero.stage" if zero.stage == 3 else "zero.offload_param"
        yield Problem(name, why, "zero.stage: 0, 1 or 2, or drop tuning.quantization")
    if spec.model.gguf_file is not None:
        why = "is already made of blocks of another kind"
        yield Problem(
            "model.gguf_file", why, "the model's own weights, or drop tuning.quantization"
        )


def _ia3(targets: tuple[str, ...] | str, within: tuple[str, ...] | str) -> Iterator[Problem]:
    if (targets == "auto") != (within == "auto"):
        field = "target_modules" if targets == "auto" else "feedforward_modules"
        fix = "a list of module names, or leave both to auto"
        yield Problem(f"tuning.{field}", "must be given where the other one is", fix, "auto")
    elif extra := sorted(set(within) - set(targets)) if targets != "auto" else []:
        fix = "add it to tuning.target_modules"
        yield Problem("tuning.feedforward_modules", "is no target module", fix, extra[0])


def _virtual_tokens(spec: JobSpec, tuning: PromptTuning | PrefixTuning) -> Iterator[Problem]:
    task = spec.task
    if getattr(task, "packing", False):
        why = f"excludes tuning.type: {tuning.type}, whose tokens would stand before the first document alone"
        yield Problem("task.packing", why, "task.packing: false, or tuning.type: lora", True)
    if task.has_reference:
        why = f"{task.type} compares with the untouched model, which new tokens in front of a text change"
        yield Problem("tuning.type", why, "tuning.type: lora or ia3", tuning.type)
    if tuning.merge_on_export:
        why = "virtual tokens are no weights of the model: there is nothing to fold them into"
        yield Problem("tuning.merge_on_export", why, "drop it: the adapter is exported", True)
    if isinstance(tuning, PrefixTuning) and spec.gradient_checkpointing:
        why = "excludes tuning.type: prefix, whose keys and values a recomputed layer would not see"
        yield Problem(
            "gradient_checkpointing", why, "drop it, or tuning.type: prompt or lora", True
        )
