"""Committed checkpoint → Hugging Face folder: weights, tokenizer, config, model card."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from orchestrator.errors import CheckpointError, DamagedFileError, OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.identity import check_base
from orchestrator.model.normalization import norm_real_frames
from orchestrator.model.padding import set_tokens
from orchestrator.model.parts import PROJECTION
from orchestrator.model.quantization import unquantized
from orchestrator.model.tuning import merged
from orchestrator.model.weights import renamed_body
from orchestrator.plan.plan import Plan
from orchestrator.report.records import append_event
from orchestrator.run_folder import (
    RunFolder,
    damaged,
    fsync_dir,
    read_object,
    storage_error,
    storage_errors,
    write_json,
)
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import FullTuning, quantized
from orchestrator.train.averaging import AVERAGED_FILE
from orchestrator.train.checkpoint import Committed, committed, damage, newest_valid
from orchestrator.train.engine import TAG
from orchestrator.train.export_tokenizer import export_tokenizer, load_exported_tokenizer
from orchestrator.train.reshard import read_weights
from orchestrator.train.tensors import load_tensors

DETAILS = "orchestrator.json"
"""What `eval` and `predict` need beside the model: the plan it came from, and its figures."""


def load_plan(folder: RunFolder) -> Plan:
    """The plan of a run; raises OrchestratorError where there is no such run."""
    data = read_object(folder.plan)
    if data is None:
        raise OrchestratorError(
            f"{folder.root}: no run there. `orchestrator runs` lists what there is; "
            "--storage-path says where to look."
        )
    return _plan(data, folder.plan)


def _plan(data: Any, source: Path) -> Plan:
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(
            source,
            f"{where}: {first['msg']} (or it was written by another version of orchestrator)",
        ) from error


def best_checkpoint(folder: RunFolder, best_step: int | None) -> Committed:
    """The valid checkpoint of the best evaluation, else the newest valid one, of which nothing is known.

    Raises CheckpointError where there is none.
    """
    for checkpoint in committed(folder.checkpoints):
        if checkpoint.step == best_step and damage(checkpoint) is None:
            return checkpoint
    newest = newest_valid(
        folder.checkpoints, lambda text: append_event(folder.events, "warning", text=text)
    )
    if newest is None:
        raise CheckpointError(f"{folder.checkpoints}: no valid checkpoint to export. Train first.")
    return newest


def checkpoint_state(checkpoint: Committed) -> dict[str, torch.Tensor]:
    """Return whole fp32 weights by name, without frozen ones; averaged ones where they are kept.

    Raises CheckpointError for a file that holds anything but values.
    """
    if (averages := checkpoint.folder / AVERAGED_FILE).exists():
        found: dict[str, torch.Tensor] = load_tensors(averages)
        return found
    if checkpoint.facts["stage"] == 0:
        path = checkpoint.folder / TAG / "mp_rank_00_model_states.pt"
        state: dict[str, torch.Tensor] = load_tensors(path)["module"]
        return state
    facts = checkpoint.facts
    return read_weights(checkpoint.folder, facts["stage"], facts["world_size"])


def load_weights(plan: Plan, checkpoint: Committed) -> Any:
    """The trained model on CPU, in the precision it was trained in, adapters still apart."""
    model = build_model(unquantized(plan.spec), plan.labels)
    if any(not p.requires_grad for p in model.parameters()):
        check_base(plan.spec, plan.base)
    whole = checkpoint_state(checkpoint)
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
        model = merged(model)
    write_export(plan, model, target, checkpoint.step, figures)
    return target


def write_export(plan: Plan, model: Any, target: Path, step: int, figures: dict[str, Any]) -> None:
    """Write a trained model, its tokenizer and its card as a folder; it appears complete or not at all."""
    set_tokens(model, plan.pad_token_id, plan.target_start)
    if plan.spec.task.pools and getattr(model.config, "use_mems_eval", False):
        model.config.use_mems_eval = False  # XLNet's memories, which pipelines cannot cut into rows
    leave_out_router_logits(model)
    with _exporting(target) as temporary:
        # transformers writes weights under the names they were read by, which name the body of another head.
        kept_names = {"save_original_format": False} if renamed_body(type(model)) else {}
        model.save_pretrained(temporary, **kept_names)
        if plan.spec.task.reads_text:
            export_tokenizer(plan, temporary)
        for name, content in plan.spec.task.exported_files(plan.labels).items():
            write_json(temporary / name, content)
        write_json(
            temporary / DETAILS,
            {"plan": plan.model_dump(mode="json"), "step": step, **figures},
        )
        (temporary / "README.md").write_text(model_card(plan, step, figures), encoding="utf-8")


def leave_out_router_logits(model: Any) -> None:
    """Turn off the router's auxiliary loss, which is for training.

    `generate` cannot write a padded batch with it: from the second token on, its mask has another length.
    """
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


@contextlib.contextmanager
def _exporting(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place, durably, at the end of the block.

    Raises StorageError where something cannot be written; the temporary folder is removed then.
    """
    from safetensors import SafetensorError

    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
        try:
            yield temporary
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            if target.exists():
                shutil.rmtree(target)
            open_by_umask(temporary)
            temporary.rename(target)
            fsync_dir(target.parent)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise storage_error(target, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def open_by_umask(folder: Path) -> None:
    """Give a folder and its files the permissions of newly made ones; some libraries write mode 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        readable = (mode & 0o444) >> 2  # a folder that may be read may be entered
        path.chmod(mode | readable if path.is_dir() else mode)


def load_exported(folder: Path) -> tuple[Plan, Any, Any]:
    """(plan, model in evaluation mode, tokenizer) of an exported folder."""
    import transformers

    details = read_object(folder / DETAILS)
    if details is None:
        raise OrchestratorError(
            f"{folder}: not a model exported by orchestrator ({DETAILS} is missing)"
        )
    plan = _plan(details.get("plan"), folder / DETAILS)
    with _naming_damage(folder):
        if (folder / "adapter_config.json").exists():
            from peft import PeftModel

            model: Any = PeftModel.from_pretrained(build_base(plan), str(folder))
        else:
            model = getattr(transformers, plan.spec.task.auto_class).from_pretrained(
                folder, trust_remote_code=False
            )
            norm_real_frames(model)
        set_tokens(model, plan.pad_token_id, plan.target_start)
        leave_out_router_logits(model)
        tokenizer = None
        if plan.spec.task.reads_text:
            tokenizer = load_exported_tokenizer(plan, folder, model.config)
    return plan, model.eval(), tokenizer


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Turn what libraries raise for a torn or missing file of an export into one error with the fix."""
    from safetensors import SafetensorError

    try:
        yield
    except OrchestratorError:
        raise
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(
            f"{folder} cannot be loaded: {first}. Delete this folder and export the run again."
        ) from error


def build_base(plan: Plan) -> Any:
    """Return the untouched model that an adapter belongs to, once its weights are known to be the same.

    Raises OrchestratorError where they are others.
    """
    check_base(plan.spec, plan.base)
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
        f"{plan.total_steps} steps of {plan.global_batch_size} rows, seed {spec.seed}",
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
        f"- learned from the outputs of `{taught.teacher}`{hints}: alpha {taught.alpha:g}, "
        f"temperature {taught.temperature:g}"
    ]
