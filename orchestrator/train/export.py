"""Committed checkpoint → Hugging Face folder: weights, tokenizer, config, model card."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.config import load_tokenizer
from orchestrator.model.parts import PROJECTION
from orchestrator.model.quantization import unquantized
from orchestrator.plan.plan import Plan
from orchestrator.report.records import append_event
from orchestrator.run_folder import RunFolder, read_json, write_json
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import FullTuning, quantized
from orchestrator.train.averaging import AVERAGED_FILE
from orchestrator.train.checkpoint import Committed, committed, damage, newest_valid
from orchestrator.train.engine import TAG

DETAILS = "orchestrator.json"
"""What `eval` and `predict` need beside the model: the plan it came from, and its figures."""


def load_plan(folder: RunFolder) -> Plan:
    """The plan of a run; raises OrchestratorError where there is no such run."""
    data = read_json(folder.plan)
    if data is None:
        raise OrchestratorError(
            f"{folder.root}: no run there. `orchestrator runs` lists what there is; "
            "--storage says where to look."
        )
    return _plan(data, folder.plan)


def _plan(data: Any, source: Path) -> Plan:
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise OrchestratorError(
            f"{source} was written by another version of orchestrator and cannot be read by this one"
        ) from error


def best_checkpoint(folder: RunFolder, best_step: int | None) -> Committed:
    """The valid checkpoint of the best evaluation, else the newest valid one, of which nothing is known.

    Raises CheckpointError where there is none.
    """
    for checkpoint in committed(folder.checkpoints):
        if checkpoint.step == best_step and damage(checkpoint) is None:
            return checkpoint
    newest = newest_valid(folder.checkpoints, lambda _: None)
    if newest is None:
        raise CheckpointError(f"{folder.checkpoints}: no valid checkpoint to export. Train first.")
    return newest


def checkpoint_state(checkpoint: Committed, only_trainable: bool) -> dict[str, torch.Tensor]:
    """Full fp32 weights by name, put together from all ranks' shards; averaged ones where they are kept."""
    if (averages := checkpoint.folder / AVERAGED_FILE).exists():
        found: dict[str, torch.Tensor] = torch.load(averages, weights_only=True)
        return found
    if checkpoint.facts["stage"] == 0:
        path = checkpoint.folder / TAG / "mp_rank_00_model_states.pt"
        state: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["module"]
        return state
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.folder), tag=TAG, exclude_frozen_parameters=only_trainable
        )
    return state


def load_weights(plan: Plan, checkpoint: Committed) -> Any:
    """The trained model on CPU, in the precision it was trained in, adapters still apart."""
    model = build_model(unquantized(plan.spec), plan.labels)
    only_trainable = any(not p.requires_grad for p in model.parameters())
    whole = checkpoint_state(checkpoint, only_trainable)
    state = {name: t for name, t in whole.items() if not name.startswith(PROJECTION)}
    if quantized(plan.spec.tuning):  # scales of 4-bit layers, which this model does not have
        state = {name: state[name] for name in model.state_dict() if name in state}
    missing, unexpected = model.load_state_dict(state, strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    lost = trainable.intersection(missing)
    if lost or unexpected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the model: missing {sorted(lost)[:3]}, "
            f"unexpected {list(unexpected)[:3]}"
        )
    return model.to(torch.bfloat16) if plan.bf16 else model


def export_run(plan: Plan, folder: RunFolder, target: Path, figures: dict[str, Any]) -> Path:
    """Write the best checkpoint of a run as a folder that `from_pretrained` loads.

    `figures`: step, best, last_eval, baseline, as the model card shows them. The folder appears
    complete or not at all.
    """
    wanted = (figures.get("best") or {}).get("step")
    checkpoint = best_checkpoint(folder, wanted)
    if wanted not in (None, checkpoint.step):
        text = (
            f"the checkpoint of the best evaluation, step {wanted}, is damaged or gone: "
            f"step {checkpoint.step} is exported"
        )
        append_event(folder.events, "warning", text=text)
        last = figures.get("last_eval") or {}
        figures = {
            **figures,
            "best": last if last.get("step") == checkpoint.step else None,
            "note": text,
        }
    model = load_weights(plan, checkpoint)
    if getattr(plan.spec.tuning, "merge_on_export", False):
        model = model.merge_and_unload()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(temporary)
        if tokenizer := load_tokenizer(plan.spec):
            tokenizer.save_pretrained(temporary)
        for name, content in plan.spec.task.exported_files(plan.labels).items():
            write_json(temporary / name, content)
        write_json(
            temporary / DETAILS,
            {"plan": plan.model_dump(mode="json"), "step": checkpoint.step, **figures},
        )
        (temporary / "README.md").write_text(
            model_card(plan, checkpoint.step, figures), encoding="utf-8"
        )
        if target.exists():
            shutil.rmtree(target)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load_exported(folder: Path) -> tuple[Plan, Any, Any]:
    """(plan, model in evaluation mode, tokenizer) of an exported folder."""
    import transformers

    details = read_json(folder / DETAILS)
    if details is None:
        raise OrchestratorError(
            f"{folder}: not a model exported by orchestrator ({DETAILS} is missing)"
        )
    plan = _plan(details["plan"], folder / DETAILS)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(build_base(plan), str(folder))
    else:
        model = getattr(transformers, plan.spec.task.auto_class).from_pretrained(folder)
    tokenizer = None
    if plan.spec.task.reads_text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return plan, model.eval(), tokenizer


def build_base(plan: Plan) -> Any:
    """The untouched model that an adapter belongs to."""
    return build_model(plan.spec.model_copy(update={"tuning": FullTuning()}), plan.labels)


def model_card(plan: Plan, step: int, figures: dict[str, Any]) -> str:
    """The exported folder's README: what it is, how it was made, how good it is."""
    spec = plan.spec
    best = figures.get("best") or {}
    scores = {
        k: v for k, v in best.items() if isinstance(v, float) and k not in ("eval_s", "train_loss")
    }
    base = spec.model.pretrained or f"a new {plan.model.model_type}"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {spec.task.pipeline_tag}",
        "---",
        "",
        f"# {spec.name}",
        "",
        f"Fine-tuned from `{base}` for {spec.task.type.replace('_', ' ')}; weights of step {step} "
        f"of {plan.total_steps}.",
        "",
    ]
    if note := figures.get("note"):
        lines += [f"Not the best weights: {note}.", ""]
    if scores:
        lines += [
            f"## Held-out figures ({best.get('rows', '?')} rows)",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in scores.items()),
            "",
        ]
    if baseline := figures.get("baseline"):
        lines += [
            f"Baseline ({baseline['name']}, {baseline['train_rows']} training rows): "
            + ", ".join(f"{k} {v:.4f}" for k, v in baseline["metrics"].items()),
            "",
        ]
    lines += [
        "## How it was made",
        "",
        f"- training rows {plan.train_data.rows:,} ({plan.train_data.tokens:,} tokens), "
        f"{plan.total_steps} steps of {plan.global_rows} rows, seed {spec.seed}",
        f"- {spec.tuning.type} tuning, {plan.model.trainable:,} of {plan.model.parameters:,} parameters trained",
        *_teacher_lines(spec),
        f"- {spec.optimizer.type}, peak learning rate {plan.learning_rate:g}, {spec.schedule.type} schedule, "
        f"{plan.warmup_steps} warm-up steps, {'bf16' if plan.bf16 else 'fp32'}",
        f"- {plan.num_workers} workers, DeepSpeed ZeRO stage {plan.stage}",
        f"- rows are cut to {plan.max_length_tokens} tokens",
        "",
    ]
    return "\n".join(lines)


def _teacher_lines(spec: JobSpec) -> list[str]:
    taught = spec.distillation
    if taught is None:
        return []
    hints = ", and its hidden states" if taught.hidden else ""
    return [
        f"- learnt from the outputs of `{taught.teacher}`{hints}: alpha {taught.alpha:g}, "
        f"temperature {taught.temperature:g}"
    ]
