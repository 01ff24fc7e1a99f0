"""Rules across fields: combinations that parse but cannot mean anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from orchestrator.errors import Problem
from orchestrator.spec.distillation_rules import distillation_rules
from orchestrator.spec.job import JobSpec, WorkerRange
from orchestrator.spec.kubernetes_rules import kubernetes_rules
from orchestrator.spec.paths import (
    is_url,
    local_files,
    near_file,
    no_such_file,
    scheme_problem,
)
from orchestrator.spec.runtime_rules import in_job_package, kept_folders, runtime_rules
from orchestrator.spec.secret_rules import secret_rules
from orchestrator.spec.sweep_rules import sweep_rules
from orchestrator.spec.training_rules import GIVE_EVAL_ROWS, NO_EVAL_ROWS, training_rules
from orchestrator.spec.tuning_rules import tuning_rules

Files = Literal["here", "packed", "there"]
"""Where local paths are looked for: all on this machine; packed, all but absolute ones, which are the
cluster's; there, none, as all are the cluster's."""

LEAVES = "leaves the working directory, which is all that the cluster gets"
STAY = "submit from a folder above both, or name an absolute path that every node sees"


def broken_rules(spec: JobSpec, files: Files = "here") -> list[Problem]:
    """Every rule across fields that `spec` breaks, in the order of the job file.

    Problems show values, so the others wait until no value is a secret.
    """
    if secrets := list(secret_rules(spec)):
        return secrets
    rules = (
        _model, tuning_rules, _data, training_rules, distillation_rules, _batch, _zero, _resources, _evaluation,
        _folders, runtime_rules, kubernetes_rules, sweep_rules,
    )  # fmt: skip
    problems = [problem for rule in rules for problem in rule(spec)]
    problems += _files(spec, files)
    if files == "packed" or in_job_package():
        problems += kept_folders(spec)
    return problems


def _model(spec: JobSpec) -> Iterator[Problem]:
    model = spec.model
    if (model.pretrained is None) == (model.config is None):
        yield Problem(
            "model",
            "needs exactly one of `pretrained` and `config`",
            "pretrained: a hub id or folder; config: a transformers config, trained from scratch",
        )
    if model.config is not None:
        if "model_type" not in model.config:
            yield Problem("model.config.model_type", "is required", "as in model_type: llama")
        for name, value in model.config.items():
            if name.endswith("layerdrop") and value:
                why = "each worker would leave out other layers"
                yield Problem(f"model.config.{name}", why, f"{name}: 0, or model.dropout", value)
        if model.tokenizer is None and spec.task.reads_text:
            yield Problem(
                "model.tokenizer", "is required with model.config", "a hub id or a folder"
            )
    if model.gguf_file is not None and model.pretrained is None:
        yield Problem("model.gguf_file", "needs model.pretrained", "the folder that holds the file")
    if model.chat_template is not None and not spec.task.reads_text:
        why = f"has no effect: {spec.task.type} reads no text"
        yield Problem("model.chat_template", why, "drop it", model.chat_template)
    if model.keep_layers is not None:
        yield from _kept_layers(spec, model.keep_layers)


def _kept_layers(spec: JobSpec, keep: tuple[int, ...]) -> Iterator[Problem]:
    field = "model.keep_layers"
    if spec.model.pretrained is None:
        fix = "set model.config.num_hidden_layers, or whatever the config calls it"
        yield Problem(field, "needs model.pretrained: new layers are all alike", fix, keep)
    if list(keep) != sorted(set(keep)):
        fix = f"[{', '.join(map(str, sorted(set(keep))))}]"
        yield Problem(field, "must name each layer once, in ascending order", fix, keep)
    if not getattr(spec.tuning, "merge_on_export", True):
        why = "excludes model.keep_layers: an adapter apart would fit no published model"
        yield Problem(
            "tuning.merge_on_export", why, "true, or a tuning.type that can be merged", False
        )


def _data(spec: JobSpec) -> Iterator[Problem]:
    data = spec.data
    if data.eval is not None and data.eval_fraction is not None:
        yield Problem("data.eval_fraction", "excludes data.eval", "keep one of the two")
    if not data.train:
        yield Problem("data.train", "names no file", "a path, a glob or a list of them")
    if spec.data.order.shuffle != "windows" and "window_rows" in data.order.model_fields_set:
        yield Problem(
            "data.order.window_rows",
            "has no effect unless data.order.shuffle is windows",
            "set data.order.shuffle=windows or drop it",
            data.order.window_rows,
        )
    yield from spec.task.broken_rules(has_eval=bool(data.eval or data.eval_fraction))


def _batch(spec: JobSpec) -> Iterator[Problem]:
    batch = spec.batch
    if (
        batch.global_batch_size != "auto"
        and batch.micro_batch_size != "auto"
        and batch.micro_batch_size > batch.global_batch_size
    ):
        yield Problem(
            "batch.micro_batch_size",
            f"exceeds batch.global_batch_size = {batch.global_batch_size}",
            f"at most {batch.global_batch_size}",
            batch.micro_batch_size,
        )


def _zero(spec: JobSpec) -> Iterator[Problem]:
    zero, gpus = spec.zero, spec.resources.gpus_per_worker
    if zero.offload_param == "cpu" and zero.stage not in (3, "auto"):
        yield Problem(
            "zero.offload_param", "needs zero.stage 3", "zero.stage: 3", zero.offload_param
        )
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        yield Problem(
            "zero.offload_optimizer",
            "needs zero.stage 1, 2 or 3",
            "zero.stage: 1",
            zero.offload_optimizer,
        )
    offloads = [n for n in ("offload_optimizer", "offload_param") if getattr(zero, n) == "cpu"]
    if gpus == 0 and offloads:
        yield Problem(
            f"zero.{offloads[0]}",
            "has no meaning for CPU workers: everything is in host memory already",
            "drop it, or set resources.gpus_per_worker",
            "cpu",
        )


def _resources(spec: JobSpec) -> Iterator[Problem]:
    workers = spec.resources.num_workers
    if isinstance(workers, WorkerRange) and workers.min > workers.max:
        yield Problem(
            "resources.num_workers.min",
            f"exceeds resources.num_workers.max = {workers.max}",
            f"at most {workers.max}",
            workers.min,
        )


def _evaluation(spec: JobSpec) -> Iterator[Problem]:
    metric, baseline_rows = spec.evaluation.metric, spec.evaluation.baseline_rows
    names = spec.task.metric_names
    has_eval = bool(spec.data.eval or spec.data.eval_fraction)
    if metric is not None and metric not in names:
        yield Problem(
            "evaluation.metric",
            f"{spec.task.type} does not report it",
            f"choose from: {', '.join(names)}",
            metric,
        )
    elif metric is not None and not has_eval:
        yield Problem("evaluation.metric", NO_EVAL_ROWS, GIVE_EVAL_ROWS, metric)
    if baseline_rows is None:
        return
    if not spec.task.has_baseline:
        yield Problem(
            "evaluation.baseline_rows",
            "the frozen-feature baseline exists for text_classification only",
            "drop it",
            baseline_rows,
        )
    elif spec.model.pretrained is None:
        yield Problem(
            "evaluation.baseline_rows",
            "needs model.pretrained: random weights make no features",
            "drop it",
            baseline_rows,
        )
    elif not has_eval:
        yield Problem("evaluation.baseline_rows", NO_EVAL_ROWS, GIVE_EVAL_ROWS, baseline_rows)


def _folders(spec: JobSpec) -> Iterator[Problem]:
    """Runs and shards are written to folders: a URL would become a folder of that name."""
    for field, value in (
        ("storage_path", spec.storage_path),
        ("data.prepared_dir", spec.data.prepared_dir),
    ):
        if is_url(value):
            why = "must be a folder: URLs are not supported here"
            fix = f"a path that every node sees: {field}=/shared/{Path(value).name}"
            yield Problem(field, why, fix, value)
        elif not value:
            yield Problem(field, "is empty", f"{field}=runs")


def _files(spec: JobSpec, files: Files) -> Iterator[Problem]:
    if files == "there":
        return
    packed = files == "packed"
    for field in ("train", "eval"):
        value = getattr(spec.data, field)
        for path in (value,) if isinstance(value, str) else (value or ()):
            yield from _data_path(f"data.{field}", path, packed)
    yield from _template_file(spec.model.chat_template, packed)
    folders = {"model.pretrained": spec.model.pretrained, "model.tokenizer": spec.model.tokenizer}
    if spec.distillation:
        folders["distillation.teacher"] = spec.distillation.teacher
    for field, name in folders.items():
        if packed and name and os.path.isabs(name):
            continue
        if packed and name and _leaves(name):
            yield Problem(field, LEAVES, STAY, name)
            continue
        if name and _looks_local(name) and not os.path.isdir(name):
            yield Problem(field, "no such folder", near_file(name), name)


def _data_path(field: str, path: str, packed: bool) -> Iterator[Problem]:
    """Problems of one path, glob or URL of rows."""
    if is_url(path):
        if path.startswith("memory://") or packed:
            return
        problem = scheme_problem(field, path)
        if problem:
            yield problem
    elif packed and os.path.isabs(path):
        return
    elif packed and _leaves(path):
        yield Problem(field, LEAVES, STAY, path)
    elif not local_files(path):
        yield Problem(field, *no_such_file(path), path)


def _template_file(path: str | None, packed: bool) -> Iterator[Problem]:
    if path is None or (packed and os.path.isabs(path)):
        return
    if packed and _leaves(path):
        yield Problem("model.chat_template", LEAVES, STAY, path)
    elif not os.path.isfile(path):
        yield Problem("model.chat_template", "no such file", near_file(path), path)


def _leaves(path: str) -> bool:
    return os.path.normpath(path).split(os.sep)[0] == os.pardir


def _looks_local(name: str) -> bool:
    """Hub ids have at most one slash and no leading dot, slash or tilde."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
