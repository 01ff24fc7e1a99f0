"""Spec + cluster + prepared data → Plan: what `plan` prints is what `train` runs."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.order import rows_per_rank
from orchestrator.data.prepare import Prepared, Split
from orchestrator.errors import PlanError
from orchestrator.model.config import (
    check_tokenizer,
    layer_drops,
    load_tokenizer,
    own_config,
)
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.plan.data import DataFacts, data_facts
from orchestrator.plan.defaults import defaults, learning_rate
from orchestrator.plan.facts import model_facts, part_rates
from orchestrator.plan.fit import Load
from orchestrator.plan.memory import ModelFacts, Stage, checkpoint_bytes
from orchestrator.plan.regularisation import (
    averaging_warnings,
    check_dropout,
    class_weights,
    mask_token,
    special_tokens,
)
from orchestrator.plan.resources import (
    Workers,
    check_cpus,
    memory_limit,
    optimizer_class,
    share_out,
    uses_bf16,
    worker_limits,
)
from orchestrator.plan.schedule import check_schedule, planned_rates, warmup_steps
from orchestrator.plan.settings import Knob, settings
from orchestrator.plan.shares import shares_of, stage_of_fewest
from orchestrator.plan.unfreezing import unfreezing_steps
from orchestrator.spec import JobSpec
from orchestrator.values import Frozen


class Plan(Frozen):
    """Everything that is derived before anything is launched."""

    spec: JobSpec
    cluster: Cluster
    work_dir: str
    """Where the job's relative paths start."""
    run_dir: str
    model: ModelFacts
    labels: tuple[str, ...]
    max_length_tokens: int
    pad_token_id: int
    """Fills rows to one length. In the plan, so that a worker need not load a tokenizer to start."""
    train_data: DataFacts
    eval_data: DataFacts | None
    num_workers: int
    gpus_per_worker: float
    cpus_per_worker: int
    bf16: bool
    stage: Stage
    global_rows: int
    rows_per_worker: int
    micro_rows: int
    accumulation: int
    group_by_length: bool
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    planned_rates: tuple[tuple[int, float], ...]
    """(step, learning rate) of the schedule at about 200 steps, to be held against what was applied."""
    eval_every_steps: int
    rungs: tuple[int, ...] = ()
    """Steps of a sweep's rungs: evaluated too, and reported to who compares the trials."""
    metric: str
    """Names the best model."""
    higher_is_better: bool
    checkpoint_every_steps: int
    checkpoint_bytes: int
    optimizer_class: str
    learning_rate: float
    """At its peak; a head with a rate of its own has another."""
    settings: tuple[Knob, ...] = ()
    """What the job sets, and what that means."""
    defaults: tuple[Knob, ...]
    """What it leaves open, and why it is what it is."""
    unfreezing: tuple[tuple[int, int], ...] = ()
    """(step, counted from 1, layers that move from then on beside the head); empty where nothing waits."""
    part_rates: tuple[tuple[float, int], ...]
    """(peak learning rate, trainable parameters) by part of the model; empty for one rate."""
    class_weights: tuple[float, ...] = ()
    """Weight of each label's rows; empty where all count alike."""
    mask_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    """Tokens that are never masked; empty where none are."""
    memory_bytes: dict[str, int]
    memory_limit_bytes: int
    deepspeed: dict[str, Any]
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.gpus_per_worker > 0

    @property
    def workers(self) -> Workers:
        """How many workers there are, and what each one gets."""
        return Workers(self.num_workers, self.gpus_per_worker, self.cpus_per_worker)

    @property
    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers that may train this job; both `num_workers` where that is fixed."""
        return worker_limits(self.spec, self.num_workers)


def make_plan(
    spec: JobSpec, cluster: Cluster, prepared: dict[Split, Prepared], work_dir: Path | None = None
) -> Plan:
    """Derive every number, each with its reason.

    Raises PlanError, with the smallest change that helps, where the job cannot fit the cluster.
    """
    reasons: dict[str, str] = {}
    train = prepared["train"]
    labels = train.manifest.labels
    model, tokenizer = model_facts(spec, labels), load_tokenizer(spec)
    check_tokenizer(spec, labels, tokenizer)
    workers = share_out(spec, cluster, reasons)
    bf16 = uses_bf16(spec, cluster, workers, reasons)
    global_rows = _global_rows(spec, train.manifest.rows, reasons)
    per_worker = rows_per_rank(global_rows, workers.count)
    limit = memory_limit(spec, cluster, workers, reasons)
    tokens = model.image_tokens or train.manifest.longest_tokens
    target_tokens = train.manifest.longest_target_tokens
    load = Load(spec, model, workers, bf16, per_worker, tokens, limit, target_tokens)
    setup, shares = shares_of(load, reasons, stage_of_fewest(load, global_rows, reasons))
    steps_per_epoch = -(-train.manifest.rows // global_rows)
    total = _total_steps(spec, steps_per_epoch, reasons)
    eval_every = _eval_every(spec, prepared, steps_per_epoch, total, reasons)
    metric = spec.evaluation.metric or spec.task.default_metric
    work_dir = work_dir or Path.cwd()
    lr, lr_source = learning_rate(spec, model)
    check_dropout(spec, labels)
    check_schedule(spec.schedule, total)
    run_dir = str(work_dir / spec.storage / spec.name)
    size = checkpoint_bytes(model, setup)
    _check_disk(spec, cluster, run_dir, size)
    check_cpus(workers, cluster)
    return Plan(
        spec=spec,
        cluster=cluster,
        work_dir=str(work_dir),
        run_dir=run_dir,
        model=model,
        labels=labels,
        max_length_tokens=train.manifest.max_length_tokens,
        pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
        mask_token_id=mask_token(spec, tokenizer, reasons),
        special_token_ids=special_tokens(spec, tokenizer),
        class_weights=class_weights(spec, labels, train.folder, reasons),
        train_data=data_facts(train),
        eval_data=data_facts(prepared["eval"]) if "eval" in prepared else None,
        gpus_per_worker=workers.gpus,
        cpus_per_worker=workers.cpus,
        bf16=bf16,
        global_rows=global_rows,
        group_by_length=_group_by_length(spec, reasons),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup_steps(spec.schedule, total),
        planned_rates=planned_rates(spec.schedule, lr, total),
        eval_every_steps=eval_every,
        metric=metric,
        higher_is_better=spec.task.higher_is_better(metric),
        checkpoint_every_steps=_checkpoint_every(spec, total, reasons),
        checkpoint_bytes=size,
        optimizer_class=optimizer_class(spec, workers.on_gpu, reasons),
        learning_rate=lr,
        settings=settings(spec),
        defaults=defaults(spec, lr, lr_source),
        unfreezing=unfreezing_steps(
            spec.tuning, max(model.layers, model.decoder_layers), steps_per_epoch, total
        ),
        part_rates=part_rates(spec, labels, lr),
        memory_limit_bytes=limit,
        reasons=reasons,
        warnings=(
            *_warnings(spec, prepared),
            *_config_warnings(spec),
            *averaging_warnings(spec, total, steps_per_epoch),
            *_start_warnings(cluster, model, shares),
        ),
        **shares,
    )


def at_workers(plan: Plan, num_workers: int, stage: Stage | None = None) -> Plan:
    """The same job on another number of workers: the global batch and all steps stay, shares change.

    `stage`: ZeRO stage, the plan's own by default, since checkpoints are bound to it. Raises PlanError
    where a worker's share does not fit.
    """
    stage = plan.stage if stage is None else stage
    if (num_workers, stage) == (plan.num_workers, plan.stage):
        return plan
    reasons = dict(plan.reasons)
    load = Load(
        spec=plan.spec,
        model=plan.model,
        workers=replace(plan.workers, count=num_workers),
        bf16=plan.bf16,
        rows=rows_per_rank(plan.global_rows, num_workers),
        tokens_per_row=plan.model.image_tokens or plan.train_data.longest_tokens,
        limit_bytes=plan.memory_limit_bytes,
        target_tokens_per_row=plan.train_data.longest_target_tokens,
    )
    _, shares = shares_of(load, reasons, stage)
    return plan.model_copy(update={**shares, "reasons": reasons})


def _global_rows(spec: JobSpec, rows: int, reasons: dict[str, str]) -> int:
    if spec.batch.global_rows != "auto":
        return spec.batch.global_rows
    usual = spec.task.usual_global_rows
    reasons["global_rows"] = (
        f"default: {usual} ({spec.task.usual_global_rows_source})"
        if rows >= usual
        else f"the data has {rows} rows"
    )
    return min(usual, rows)


def _total_steps(spec: JobSpec, steps_per_epoch: int, reasons: dict[str, str]) -> int:
    stop = spec.stop
    epochs = stop.max_epochs
    if epochs is None and stop.max_steps is None:
        epochs = 1.0
        reasons["total_steps"] = (
            "default: one epoch, and no more than a start; Devlin et al., arXiv 1810.04805, A.3, took 2 to 4"
        )
    by_epochs = math.ceil(epochs * steps_per_epoch) if epochs is not None else None
    limits = [n for n in (by_epochs, stop.max_steps) if n is not None]
    if len(limits) == 2:
        which = "stop.max_steps" if limits[1] <= limits[0] else "stop.max_epochs"
        reasons["total_steps"] = f"{which} comes first"
    return max(1, min(limits))


def _eval_every(
    spec: JobSpec,
    prepared: dict[Split, Prepared],
    per_epoch: int,
    total: int,
    reasons: dict[str, str],
) -> int:
    """Steps between evaluations; 0 where there is nothing to evaluate on."""
    if "eval" not in prepared:
        reasons["eval_every_steps"] = "no data.eval and no data.eval_fraction"
        return 0
    match spec.evaluation.every_steps:
        case "epoch":
            reasons["eval_every_steps"] = "once per epoch"
            return min(per_epoch, total)
        case "end":
            return total
        case steps:
            return min(steps, total)


def _checkpoint_every(spec: JobSpec, total: int, reasons: dict[str, str]) -> int:
    if spec.checkpoint.every_steps != "auto":
        return min(spec.checkpoint.every_steps, total)
    reasons["checkpoint_every_steps"] = "ten over the run, at least 20 steps apart"
    return min(total, max(20, math.ceil(total / 10)))


def _group_by_length(spec: JobSpec, reasons: dict[str, str]) -> bool:
    wanted = spec.data.order.group_by_length
    if wanted != "auto":
        return wanted
    if spec.data.order.shuffle == "none":
        reasons["group_by_length"] = (
            "data.order.shuffle is none: rows stay in the order of the files"
        )
        return False
    packed = spec.task.fixed_length and getattr(spec.task, "packing", True)
    reasons["group_by_length"] = "all rows have one length" if packed else "less padding"
    return not packed


def _warnings(spec: JobSpec, prepared: dict[Split, Prepared]) -> list[str]:
    out = []
    for split, one in prepared.items():
        m = one.manifest
        if m.bad_rows:
            out.append(f"{split}: {m.bad_rows} of {m.input_rows} rows were skipped as unusable")
        if m.truncated_rows:
            out.append(
                f"{split}: {m.truncated_rows} of {m.input_rows} rows were cut to {m.max_length_tokens} tokens"
            )
    if spec.data.order.shuffle == "windows":
        out.append(
            f"rows are shuffled within windows of {spec.data.order.window_rows:,} rows, not over all of them"
        )
    return out


def _config_warnings(spec: JobSpec) -> Iterator[str]:
    """What of the model's config is not taken over."""
    for name, value in layer_drops(own_config(spec)).items():
        yield (
            f"{name} = {value:g} of the model's config is taken as 0: each worker would leave out other layers"
        )


def _start_warnings(cluster: Cluster, model: ModelFacts, shares: dict[str, Any]) -> Iterator[str]:
    """At stage 3 every worker holds the whole model in host memory until DeepSpeed has cut it up."""
    if shares["stage"] < 3:
        return
    per_node = -(-shares["num_workers"] // len(cluster.nodes))
    need, have = per_node * 4 * model.parameters, min(n.memory_bytes for n in cluster.nodes)
    if need > have:
        yield (
            f"while they start, {per_node} workers of a node hold the whole model each, {need / GIB:.0f} GiB "
            f"of host memory in all; the node has {have / GIB:.0f} GiB. Use fewer workers per node."
        )


def _check_disk(spec: JobSpec, cluster: Cluster, run_dir: str, checkpoint: int) -> None:
    free = shutil.disk_usage(_existing_parent(Path(run_dir))).free
    free += _size_bytes(
        Path(run_dir) / "checkpoints"
    )  # a run that goes on makes room as it commits
    need = checkpoint * (spec.checkpoint.keep + 2)
    if need > free and not cluster.is_elsewhere:
        raise PlanError(
            f"checkpoints need up to {need / GIB:.2f} GiB ({spec.checkpoint.keep} kept, the best, one being written); "
            f"{run_dir} has {free / GIB:.2f} GiB free. Free some, lower checkpoint.keep, or set storage."
        )


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be tidying up
            total += path.stat().st_size if path.is_file() else 0
    return total


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
