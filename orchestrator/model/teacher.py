"""The larger model that a job's model learns from: which one, whether it fits, and its loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.config import load_config, raw_config
from orchestrator.model.head import fate_of_head
from orchestrator.model.layers import layer_stack
from orchestrator.model.padding import set_tokens
from orchestrator.model.positions import max_length_tokens, text_positions
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.spec import JobSpec
from orchestrator.spec.distillation import DistillationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.tuning import FullTuning

FIELD = "distillation.teacher"


def asked(spec: JobSpec) -> DistillationSpec:
    """The job's distillation, where there is one."""
    assert spec.distillation is not None
    return spec.distillation


def teacher_source(spec: JobSpec) -> str:
    """Hub id or folder of the teacher; a run folder stands for what it exported.

    Raises OrchestratorError for a folder without a whole model.
    """
    named = Path(asked(spec).teacher)
    if not named.is_dir():
        return asked(spec).teacher
    folder = next((f for f in (named, named / "export") if (f / "config.json").exists()), None)
    if folder is not None:
        return str(folder)
    raise OrchestratorError(
        f"{FIELD} = {str(named)!r}: holds no model (config.json), nor does its folder `export`. An adapter "
        "alone is none: export it merged (tuning.merge_on_export: true)."
    )


def teacher_spec(spec: JobSpec) -> JobSpec:
    """The job with the teacher in place of its model."""
    model = ModelSpec(
        pretrained=teacher_source(spec),
        revision=asked(spec).revision,
        attention=spec.model.attention,
    )
    update = {"model": model, "tuning": FullTuning(), "gradient_checkpointing": False}
    return spec.model_copy(update=update)


def load_teacher(spec: JobSpec, labels: tuple[str, ...], pad_token_id: int) -> Any:
    """The teacher in fp32, at rest."""
    model: Any = build_model(teacher_spec(spec), labels)
    set_tokens(model, pad_token_id, {})
    return model.eval().requires_grad_(False)


def check_teacher(spec: JobSpec, labels: tuple[str, ...]) -> None:
    """Raises OrchestratorError where the teacher does not do the job's task on the job's rows."""
    taught = teacher_spec(spec)
    _check_kind(taught, labels)
    if not spec.task.reads_text:
        return
    theirs, ours = load_tokenizer(taught).get_vocab(), load_tokenizer(spec).get_vocab()
    if theirs != ours:
        raise OrchestratorError(
            f"{FIELD} = {taught.model.pretrained!r}: its tokenizer is another one than the student's "
            f"({len(theirs):,} and {len(ours):,} tokens). Rows are kept as the student's tokens, so the "
            "teacher would read nonsense. Choose a teacher with the same tokenizer."
        )
    positions, longest = text_positions(taught), max_length_tokens(spec)
    if positions is not None and positions < longest:
        raise OrchestratorError(
            f"{FIELD} = {taught.model.pretrained!r}: has {positions} positions, and rows may be {longest} tokens "
            f"long. Set data.max_length_tokens={positions}."
        )


def _check_kind(taught: JobSpec, labels: tuple[str, ...]) -> None:
    config, name = raw_config(taught), taught.model.pretrained
    model = build_model(taught, labels, on_meta=True)
    if asked(taught).hidden is not None:
        layer_stack(model, "distillation.hidden")
    wanted = type(model).__name__
    if wanted not in (config.get("architectures") or ()):
        raise OrchestratorError(
            f"{FIELD} = {name!r}: was not trained for {taught.task.type}, as its config.json says "
            f"(architectures: {config.get('architectures')}; {wanted} is needed). Fine-tune it first, "
            "and name its export."
        )
    if not taught.task.labeled_head:
        return
    outputs = len(config.get("id2label") or {0: "", 1: ""})  # transformers writes no names of two
    ours = len(taught.task.config_overrides(labels)["id2label"])
    if fate_of_head(taught, labels) != "kept" or outputs != ours:
        theirs = ", ".join(str(label) for label in (config.get("id2label") or {}).values())
        raise OrchestratorError(
            f"{FIELD} = {name!r}: was trained for other labels than {', '.join(labels)} "
            f"({theirs or f'{outputs} without names'})."
        )


def paired_layers(spec: JobSpec) -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's layer), counted from 1, whose outputs are compared; none without `hidden`.

    Raises OrchestratorError for layers that do not exist.
    """
    hidden = asked(spec).hidden
    if hidden is None:
        return ()
    keep = spec.model.keep_layers
    student = len(keep) if keep is not None else _layers(spec)
    teacher = _layers(teacher_spec(spec))
    field = "distillation.hidden.layers"
    match hidden.layers:
        case "last":
            return ((student, teacher),)
        case "even":
            if teacher % student:
                raise OrchestratorError(
                    f"{field} = even: the teacher's {teacher} layers are no multiple of the student's {student}. "
                    "Name the pairs, as in {1: 2, 2: 5}."
                )
            return tuple((i, i * teacher // student) for i in range(1, student + 1))
        case dict() as pairs:
            for mine, theirs in sorted(pairs.items()):
                if mine > student or theirs > teacher:
                    raise OrchestratorError(
                        f"{field}: {mine} → {theirs}, but the student has {student} layers and the teacher {teacher}."
                    )
            return tuple(sorted(pairs.items()))


def _layers(spec: JobSpec) -> int:
    return int(load_config(spec, ()).get_text_config().num_hidden_layers)


def teacher_hidden_size(spec: JobSpec) -> int:
    """Width of the teacher's hidden states."""
    return int(load_config(teacher_spec(spec), ()).get_text_config().hidden_size)
