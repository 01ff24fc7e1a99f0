"""Spec + cluster + prepared data → Plan: what `plan` prints is what `train` runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.order import rows_per_rank
from orchestrator.data.prepare import Prepared, Split
from orchestrator.data.stream import READ_CPUS
from orchestrator.errors import PlanError
from orchestrator.plan.cluster import GIB, Cluster
from orchestrator.plan.facts import model_facts
from orchestrator.plan.memory import MemorySetup, ModelFacts, checkpoint_bytes, memory_bytes
from orchestrator.plan.schedule import warmup_steps
from orchestrator.plan.zero import bucket_elements, deepspeed_config
from orchestrator.spec import JobSpec
from orchestrator.spec.optimization import SGD, AdamW
from orchestrator.values import Frozen

MEMORY_SHARE = 0.85
"""Share of a worker's memory that the plan fills; the rest is for what the estimate does not know."""
LORA_SHARE = 0.02
"""Share of the weights that adapters train, for a first guess before they are counted."""
DATA_CPUS = 2 * READ_CPUS
"""CPUs kept free for Ray Data; without them reads starve and the run hangs without a word."""
Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


class DataFacts(Frozen):
    """One prepared split, as the plan needs it."""

    folder: str
    rows: int
    tokens: int
    target_tokens: int
    longest_tokens: int
    truncated_rows: int
    bad_rows: int


class Plan(Frozen):
    """Everything that is derived before anything is launched."""

    spec: JobSpec
    cluster: Cluster
    work_dir: str
    """Where the job's relative paths start."""
    run_dir: str
    model: ModelFacts
    labels: tuple[str, ...]
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
    eval_every_steps: int
    metric: str
    """Names the best model."""
    higher_is_better: bool
    checkpoint_every_steps: int
    checkpoint_bytes: int
    optimizer_class: str
    memory_bytes: dict[str, int]
    memory_limit_bytes: int
    deepspeed: dict[str, Any]
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.gpus_per_worker > 0


def make_plan(
    spec: JobSpec, cluster: Cluster, prepared: dict[Split, Prepared], work_dir: Path | None = None
) -> Plan:
    """Derive every number, each with its reason.

    Raises PlanError, with the smallest change that helps, where the job cannot fit the cluster.
    """
    reasons: dict[str, str] = {}
    train = prepared["train"]
    labels = train.manifest.labels
    model = model_facts(spec, labels)
    workers, gpus, cpus = _workers(spec, cluster, reasons)
    bf16 = _precision(spec, cluster, gpus, reasons)
    global_rows = _global_rows(spec, train.manifest.rows, reasons)
    per_worker = rows_per_rank(global_rows, workers)
    limit = _memory_limit(cluster, workers, gpus, reasons)
    tokens_per_row = train.manifest.longest_tokens
    stage, micro_rows, setup = _fit(
        spec, model, workers, gpus > 0, bf16, per_worker, tokens_per_row, limit, reasons
    )
    accumulation = -(-per_worker // micro_rows)
    steps_per_epoch = -(-train.manifest.rows // global_rows)
    total = _total_steps(spec, steps_per_epoch, reasons)
    eval_every = _eval_every(spec, prepared, steps_per_epoch, total, reasons)
    metric = spec.evaluation.metric or spec.task.default_metric
    work_dir = work_dir or Path.cwd()
    run_dir = str(work_dir / spec.storage / spec.name)
    size = checkpoint_bytes(model, setup)
    return Plan(
        spec=spec,
        cluster=cluster,
        work_dir=str(work_dir),
        run_dir=run_dir,
        model=model,
        labels=labels,
        train_data=data_facts(train),
        eval_data=data_facts(prepared["eval"]) if "eval" in prepared else None,
        num_workers=workers,
        gpus_per_worker=gpus,
        cpus_per_worker=cpus,
        bf16=bf16,
        stage=stage,
        global_rows=global_rows,
        rows_per_worker=per_worker,
        micro_rows=micro_rows,
        accumulation=accumulation,
        group_by_length=_group_by_length(spec, reasons),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup_steps(spec.schedule, total),
        eval_every_steps=eval_every,
        metric=metric,
        higher_is_better=spec.task.higher_is_better(metric),
        checkpoint_every_steps=_checkpoint_every(spec, total, reasons),
        checkpoint_bytes=size,
        optimizer_class=_optimizer_class(spec, gpus > 0, reasons),
        memory_bytes=memory_bytes(model, setup, micro_rows, tokens_per_row),
        memory_limit_bytes=limit,
        deepspeed=deepspeed_config(
            spec, stage, bf16, micro_rows, accumulation, workers, setup.bucket_elements, gpus > 0
        ),
        reasons=reasons,
        warnings=tuple(_warnings(spec, prepared, run_dir, size, cluster, workers * cpus)),
    )


def data_facts(prepared: Prepared) -> DataFacts:
    """A prepared split in the words of the plan."""
    manifest = prepared.manifest
    names = ("rows", "tokens", "target_tokens", "longest_tokens", "truncated_rows", "bad_rows")
    return DataFacts(folder=str(prepared.folder), **{n: getattr(manifest, n) for n in names})


def _workers(spec: JobSpec, cluster: Cluster, reasons: dict[str, str]) -> tuple[int, float, int]:
    """(workers, GPUs each, CPUs each)."""
    wanted = spec.resources
    gpus = wanted.gpus_per_worker
    if isinstance(gpus, str):
        gpus = 1.0 if cluster.gpus else 0.0
        reasons["gpus_per_worker"] = f"{cluster.source} has {cluster.gpus:g} GPUs"
    count = wanted.num_workers
    most = int(sum(n.gpus // gpus for n in cluster.nodes)) if gpus else int(cluster.cpus)
    if isinstance(count, str):
        count = max(1, most if gpus else min(2, most))
        reasons["num_workers"] = (
            "one per GPU" if gpus else "two on CPU, one where there is one core"
        )
    if count > most:
        what = f"{gpus:g} GPU each" if gpus else "a CPU each"
        raise PlanError(
            f"resources.num_workers = {count} with {what} does not fit {cluster}: at most {most}. "
            + (f"Set resources.num_workers={most}." if most else "Set resources.gpus_per_worker=0.")
        )
    cpus = wanted.cpus_per_worker
    if isinstance(cpus, str):
        per_node = -(-count // len(cluster.nodes))
        cpus = max(1, int(min(n.cpus for n in cluster.nodes) // per_node))
        reasons["cpus_per_worker"] = f"{per_node} worker(s) share a node"
    if count * cpus > cluster.cpus:
        raise PlanError(
            f"resources.cpus_per_worker = {cpus} for {count} workers needs {count * cpus} CPUs; "
            f"{cluster}. Set resources.cpus_per_worker={max(1, int(cluster.cpus // count))}."
        )
    return count, gpus, cpus


def _precision(spec: JobSpec, cluster: Cluster, gpus: float, reasons: dict[str, str]) -> bool:
    if spec.precision != "auto":
        return spec.precision == "bf16"
    names = {n.gpu_name or "" for n in cluster.nodes if n.gpus}
    old = [n for n in names if any(k in n.upper() for k in ("V100", "T4", "P100"))]
    if gpus and not old:
        reasons["bf16"] = "these GPUs compute in bf16"
        return True
    reasons["bf16"] = (
        f"{old[0]} has no bf16" if old else "CPU workers: fp32 is exact, bf16 no faster"
    )
    return False


def _global_rows(spec: JobSpec, rows: int, reasons: dict[str, str]) -> int:
    if spec.batch.global_rows != "auto":
        return spec.batch.global_rows
    usual = 16 if spec.task.type == "causal_lm" else 32
    reasons["global_rows"] = (
        f"default: {usual} (Devlin et al., arXiv 1810.04805, tuned BERT with 16 and 32)"
        if rows >= usual
        else f"the data has {rows} rows"
    )
    return min(usual, rows)


def _memory_limit(cluster: Cluster, workers: int, gpus: float, reasons: dict[str, str]) -> int:
    if gpus:
        reasons["memory_limit_bytes"] = f"memory of the smallest GPU × {gpus:g}"
        return int(min(n.gpu_memory_bytes for n in cluster.nodes if n.gpus) * min(gpus, 1))
    per_node = -(-workers // len(cluster.nodes))
    smallest = min(n.memory_bytes for n in cluster.nodes)
    reasons["memory_limit_bytes"] = (
        f"{smallest / GIB:.1f} GiB per node shared by {per_node} worker(s)"
    )
    return smallest // per_node


def _fit(
    spec: JobSpec,
    model: ModelFacts,
    workers: int,
    on_gpu: bool,
    bf16: bool,
    per_worker: int,
    tokens_per_row: int,
    limit: int,
    reasons: dict[str, str],
) -> tuple[Stage, int, MemorySetup]:
    """The lowest ZeRO stage and the largest micro-batch that fit."""

    def setup(stage: Stage) -> MemorySetup:
        return MemorySetup(
            world_size=workers,
            stage=stage,
            bf16=bf16,
            optimizer_states=_optimizer_states(spec),
            offload_optimizer=spec.zero.offload_optimizer == "cpu",
            offload_param=spec.zero.offload_param == "cpu",
            bucket_elements=bucket_elements(spec, model.trainable),
            gradient_checkpointing=spec.gradient_checkpointing,
            on_gpu=on_gpu,
            all_logits=spec.task.type == "causal_lm",
        )

    def total(stage: Stage, rows: int) -> int:
        return sum(memory_bytes(model, setup(stage), rows, tokens_per_row).values())

    room = int(limit * MEMORY_SHARE)
    fixed_rows = 1 if spec.batch.micro_rows == "auto" else min(spec.batch.micro_rows, per_worker)
    wanted = spec.zero.stage
    if wanted == "auto":
        lowest = _lowest_stage(spec)
        stages = [s for s in STAGES if s >= lowest] if workers > 1 else [lowest]
        stage: Stage = next((s for s in stages if total(s, fixed_rows) <= room), stages[-1])
        reasons["stage"] = f"the lowest that fits {room / GIB:.1f} GiB per worker"
    else:
        stage = wanted
    if total(stage, fixed_rows) > room:
        raise PlanError(_too_big(spec, model, setup(stage), fixed_rows, tokens_per_row, room))
    if spec.batch.micro_rows != "auto":
        return stage, fixed_rows, setup(stage)
    rows = per_worker
    while total(stage, rows) > room:
        rows = -(-rows // 2)
    micro = math.ceil(per_worker / math.ceil(per_worker / rows))
    reasons["micro_rows"] = (
        "a worker's whole share of the batch fits"
        if micro == per_worker
        else f"the most rows of {tokens_per_row} tokens that fit {room / GIB:.1f} GiB"
    )
    return stage, micro, setup(stage)


def _lowest_stage(spec: JobSpec) -> Stage:
    if spec.zero.offload_param == "cpu":
        return 3
    return 1 if spec.zero.offload_optimizer == "cpu" else 0


def _optimizer_states(spec: JobSpec) -> int:
    match spec.optimizer:
        case AdamW():
            return 2
        case SGD(momentum=momentum):
            return 1 if momentum else 0


def _too_big(
    spec: JobSpec, model: ModelFacts, setup: MemorySetup, rows: int, tokens: int, room: int
) -> str:
    """Says what is missing and which change makes it fit: alone, or else which ones together."""

    def need(helps: Sequence[_Change]) -> int:
        changed = setup.model_copy(update={k: v for c in helps for k, v in c.setup.items()})
        tuned = LORA_SHARE if any(c.lora for c in helps) else 1
        facts = model.model_copy(update={"trainable": int(model.trainable * tuned)})
        fewer = 1 if any(c.one_row for c in helps) else rows
        return sum(memory_bytes(facts, changed, fewer, tokens).values())

    changes = _changes(spec, setup, rows)
    fixes = [change.text for change in changes if need([change]) <= room]
    together = next((n for n in range(2, len(changes) + 1) if need(changes[:n]) <= room), 0)
    if not fixes and together:
        fixes = [" and ".join(change.text for change in changes[:together])]
    if not fixes:
        fixes = ["a smaller model, a shorter data.max_length_tokens or larger workers"]
    return (
        f"one worker needs {need([]) / GIB:.1f} GiB at ZeRO stage {setup.stage} with {rows} row(s) of "
        f"{tokens} tokens; {room / GIB:.1f} GiB are to be had. What helps: {', or '.join(fixes)}."
    )


@dataclass(frozen=True)
class _Change:
    """A change to the job that saves memory, and what it does to the estimate."""

    text: str
    setup: dict[str, Any] = field(default_factory=dict)
    one_row: bool = False
    lora: bool = False


def _changes(spec: JobSpec, setup: MemorySetup, rows: int) -> list[_Change]:
    """What the job can still save, the least intrusive first."""
    highest = 3 if setup.world_size > 1 else max(1, setup.stage)
    offload = {"offload_optimizer": True, "stage": setup.stage or highest}
    staged = " zero.stage=auto" if spec.zero.stage == 0 else ""
    pinned = spec.zero.stage != "auto" and setup.stage < highest and setup.world_size > 1
    offers = (
        (rows > 1, _Change("batch.micro_rows=auto", one_row=True)),
        (
            not spec.gradient_checkpointing,
            _Change("gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ),
        (not setup.bf16, _Change("precision=bf16", {"bf16": True})),
        (
            setup.on_gpu and not setup.offload_optimizer,
            _Change(f"zero.offload_optimizer=cpu{staged}", offload),
        ),
        (pinned, _Change("zero.stage=auto", {"stage": highest})),
        (
            spec.tuning.type == "full" and spec.model.config is None,
            _Change("tuning.type=lora", lora=True),
        ),
    )
    return [change for possible, change in offers if possible]


def _total_steps(spec: JobSpec, steps_per_epoch: int, reasons: dict[str, str]) -> int:
    stop = spec.stop
    epochs = stop.max_epochs
    if epochs is None and stop.max_steps is None:
        epochs = 1.0
        reasons["total_steps"] = "default: one epoch"
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
    packed = spec.task.fixed_length and getattr(spec.task, "packing", False)
    reasons["group_by_length"] = "rows are packed to one length" if packed else "less padding"
    return not packed


def _optimizer_class(spec: JobSpec, on_gpu: bool, reasons: dict[str, str]) -> str:
    optimizer = spec.optimizer
    if isinstance(optimizer, SGD):
        return "torch.optim.SGD"
    offloaded = on_gpu and spec.zero.offload_optimizer == "cpu"
    name = (
        "deepspeed.ops.adam.FusedAdam"
        if on_gpu and not offloaded
        else "deepspeed.ops.adam.DeepSpeedCPUAdam"
    )
    compiler = "nvcc" if on_gpu and not offloaded else "g++"
    if optimizer.implementation == "deepspeed":
        return name
    if (
        optimizer.implementation == "auto"
        and on_gpu
        and shutil.which(compiler)
        and shutil.which("ninja")
    ):
        reasons["optimizer_class"] = f"{compiler} and ninja are here to compile it"
        return name
    if optimizer.implementation == "auto":
        reasons["optimizer_class"] = (
            f"{compiler} or ninja is missing here: torch's fused kernel needs no compiler"
            if on_gpu
            else "torch's fused CPU kernel needs no compiler"
        )
    return "torch.optim.AdamW"


def _warnings(
    spec: JobSpec,
    prepared: dict[Split, Prepared],
    run_dir: str,
    checkpoint: int,
    cluster: Cluster,
    worker_cpus: float,
) -> list[str]:
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
    free = shutil.disk_usage(_existing_parent(Path(run_dir))).free
    need = checkpoint * (spec.checkpoint.keep + 2)
    if need > free and not cluster.is_described:  # this machine's disk says nothing about its disk
        raise PlanError(
            f"checkpoints need up to {need / GIB:.2f} GiB ({spec.checkpoint.keep} kept, the best, one being written); "
            f"{run_dir} has {free / GIB:.2f} GiB free. Free some, lower checkpoint.keep, or set storage."
        )
    if cluster.source == "Ray cluster" and worker_cpus + DATA_CPUS > cluster.cpus:
        raise PlanError(
            f"the workers take {worker_cpus:g} of {cluster.cpus:g} CPUs and leave none for Ray Data, "
            f"which needs {DATA_CPUS:g}: reads would starve. Lower resources.cpus_per_worker."
        )
    return out


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
