"""Spec + cluster + prepared data → Plan: what `plan` prints is what `train` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from orchestrator.data.order import rows_per_rank
from orchestrator.data.prepare import Prepared, Split
from orchestrator.metric import Metric
from orchestrator.model.causal import check_causal, how_packed, settled
from orchestrator.model.identity import ModelIdentity, identity_of
from orchestrator.model.padding import Side, padded_on, padding_id, padding_side
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan.cluster import Cluster
from orchestrator.plan.data import DataStats, check_rows, data_facts
from orchestrator.plan.defaults import defaults, learning_rate
from orchestrator.plan.disk import check_disk
from orchestrator.plan.fit import Load
from orchestrator.plan.memory import ModelStats, Stage, checkpoint_bytes
from orchestrator.plan.model_stats import model_stats, part_rates
from orchestrator.plan.regularization import (
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
from orchestrator.plan.schedule import planned_rates
from orchestrator.plan.settings import Setting, settings
from orchestrator.plan.steps import (
    checkpoint_every_steps,
    eval_every_steps,
    global_rows_of,
    group_by_length,
    total_steps,
)
from orchestrator.plan.unfreezing import unfreezing_steps
from orchestrator.plan.warnings import (
    config_warnings,
    data_warnings,
    generation_warnings,
    packing_warnings,
    start_warnings,
    weight_warnings,
)
from orchestrator.plan.worker_plan import stage_of_min_workers, worker_plan
from orchestrator.renames import PLAN_FORMAT
from orchestrator.spec import JobSpec
from orchestrator.tasks.tokenizing import target_start
from orchestrator.values import Frozen

if TYPE_CHECKING:
    import numpy as np
    import torch


class Plan(Frozen):
    """Everything that is derived before anything is launched."""

    format_version: Literal[2] = PLAN_FORMAT
    """Format of the stored plan; `renames.upgraded_plan` reads older ones."""
    spec: JobSpec
    cluster: Cluster
    work_dir: str
    """Where the job's relative paths start."""
    run_dir: str
    model: ModelStats
    base: ModelIdentity | None = None
    """The weights that the model begins with; None in plans of earlier versions."""
    labels: tuple[str, ...]
    max_length_tokens: int
    pad_token_id: int
    """Fills rows to one length. In the plan, so that a worker need not load a tokenizer to start."""
    padding_side: Side = "right"
    """Side of a row on which padding changes no result of the model."""
    target_start: dict[str, int] = Field(default={})
    """Settings of generation by which a target begins with its language; empty for most tokenizers."""
    train_data: DataStats
    eval_data: DataStats | None
    num_workers: int
    gpus_per_worker: float
    cpus_per_worker: int
    bf16: bool
    stage: Stage
    global_batch_size: int
    rows_per_worker: int
    micro_batch_size: int
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
    settings: tuple[Setting, ...] = ()
    """What the job sets, and what that means."""
    defaults: tuple[Setting, ...]
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
    def selection_metric(self) -> Metric:
        """Return the metric that names the best model, with its direction."""
        return Metric(self.metric, self.higher_is_better)

    @property
    def on_gpu(self) -> bool:
        return self.gpus_per_worker > 0

    def collate(self, rows: Sequence[Any], weights: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of a micro-batch, padded as the model needs it; see `Task.collate`."""
        batch = self.spec.task.collate(rows, weights, self.pad_token_id)
        return padded_on(batch, self.padding_side)

    @property
    def workers(self) -> Workers:
        """Return how many workers there are, and what each one gets."""
        return Workers(self.num_workers, self.gpus_per_worker, self.cpus_per_worker)

    @property
    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers that may train this job; both `num_workers` where that is fixed."""
        return worker_limits(self.spec, self.num_workers)


def _check(
    spec: JobSpec, cluster: Cluster, labels: tuple[str, ...], workers: Workers, total_steps: int
) -> None:
    """Raise PlanError for settings that the model, the steps or the cluster cannot have."""
    check_dropout(spec, labels)
    spec.schedule.check(total_steps)
    check_cpus(workers, cluster)


def _job_warnings(
    asked: JobSpec,
    spec: JobSpec,
    prepared: dict[Split, Prepared],
    reasons: dict[str, str],
    padding: str | None,
) -> Iterator[str]:
    """Yield warnings on the job's data, model and rows.

    Args:
        asked: the job as the user wrote it.
        spec: the job with its open fields settled.
        prepared: the job's rows.
        reasons: the plan's reasons so far.
        padding: the warning on padding, if any.
    """
    yield from data_warnings(spec, prepared)
    yield from config_warnings(spec)
    yield from weight_warnings(spec, prepared["train"].manifest.labels)
    yield from generation_warnings(spec)
    yield from packing_warnings(asked, spec, reasons)
    if padding:
        yield padding


def make_plan(
    spec: JobSpec, cluster: Cluster, prepared: dict[Split, Prepared], work_dir: Path | None = None
) -> Plan:
    """Derive every number, each with its reason.

    Raises PlanError, with the smallest change that helps, where the job cannot fit the cluster.
    """
    reasons: dict[str, str] = {}
    train = prepared["train"]
    labels = train.manifest.labels
    asked, spec = spec, _settled(spec, reasons)
    model, tokenizer = model_stats(spec, labels), load_tokenizer(spec)
    check_rows(spec, labels, prepared)
    side, padding_warning = padding_side(spec, labels)
    workers = share_out(spec, cluster, reasons)
    bf16 = uses_bf16(spec, cluster, workers, reasons)
    global_batch_size = global_rows_of(spec, train.manifest.rows, reasons)
    per_worker = rows_per_rank(global_batch_size, workers.count)
    limit = memory_limit(spec, cluster, workers, reasons)
    tokens = model.image_tokens or train.manifest.longest_tokens
    target_tokens = train.manifest.longest_target_tokens
    load = Load(spec, model, workers, bf16, per_worker, tokens, limit, target_tokens)
    stage = stage_of_min_workers(load, global_batch_size, reasons)
    setup, shares = worker_plan(load, reasons, stage)
    steps_per_epoch = -(-train.manifest.rows // global_batch_size)
    total = total_steps(spec, steps_per_epoch, reasons)
    metric = spec.evaluation.metric or spec.task.default_metric
    work_dir = work_dir or Path.cwd()
    run_dir = str(work_dir / spec.storage_path / spec.name)
    size = checkpoint_bytes(model, setup)
    lr, lr_source = learning_rate(spec, model)
    _check(spec, cluster, labels, workers, total)
    check_disk(spec, cluster, run_dir, size)
    return Plan(
        spec=spec,
        cluster=cluster,
        work_dir=str(work_dir),
        run_dir=run_dir,
        model=model,
        base=identity_of(spec),
        labels=labels,
        max_length_tokens=train.manifest.max_length_tokens,
        pad_token_id=padding_id(spec, labels, tokenizer),
        padding_side=side,
        target_start=target_start(tokenizer) if tokenizer is not None else {},
        mask_token_id=mask_token(spec, tokenizer, reasons),
        special_token_ids=special_tokens(spec, tokenizer),
        class_weights=class_weights(spec, labels, train.folder, reasons),
        train_data=data_facts(train),
        eval_data=data_facts(prepared["eval"]) if "eval" in prepared else None,
        gpus_per_worker=workers.gpus,
        cpus_per_worker=workers.cpus,
        bf16=bf16,
        global_batch_size=global_batch_size,
        group_by_length=group_by_length(spec, reasons),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=spec.schedule.total_warmup_steps(total),
        planned_rates=planned_rates(spec.schedule, lr, total),
        eval_every_steps=eval_every_steps(spec, prepared, steps_per_epoch, total, reasons),
        metric=metric,
        higher_is_better=spec.task.metric(metric).maximize,
        checkpoint_every_steps=checkpoint_every_steps(spec, total, reasons),
        checkpoint_bytes=size,
        optimizer_class=optimizer_class(spec, workers.on_gpu, reasons),
        learning_rate=lr,
        settings=settings(spec),
        defaults=defaults(spec, lr, lr_source),
        unfreezing=unfreezing_steps(spec.tuning, model.deepest, steps_per_epoch, total),
        part_rates=part_rates(spec, labels, lr),
        memory_limit_bytes=limit,
        reasons=reasons,
        warnings=(
            *_job_warnings(asked, spec, prepared, reasons, padding_warning),
            *spec.regularization.averaging.warnings(total, steps_per_epoch),
            *start_warnings(cluster, model, shares),
        ),
        **shares,
    )


def _settled(spec: JobSpec, reasons: dict[str, str]) -> JobSpec:
    """Return the job with its documents packed as its model allows.

    Raises OrchestratorError for a model that sees the tokens it is to predict.
    """
    check_causal(spec)
    if getattr(spec.task, "packing", False):
        reasons["packing"] = how_packed(spec)[1]
    return settled(spec)


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
        rows=rows_per_rank(plan.global_batch_size, num_workers),
        tokens_per_row=plan.model.image_tokens or plan.train_data.longest_tokens,
        limit_bytes=plan.memory_limit_bytes,
        target_tokens_per_row=plan.train_data.longest_target_tokens,
    )
    _, shares = worker_plan(load, reasons, stage)
    return plan.model_copy(update={**shares, "reasons": reasons})
