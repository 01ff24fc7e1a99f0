"""A plan on the screen: each number with its reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from orchestrator.data.order import rows_per_rank
from orchestrator.plan.cluster import GIB
from orchestrator.plan.data import DataStats
from orchestrator.plan.plan import Plan, at_workers
from orchestrator.plan.show_learning import (
    default_rows,
    learning,
    schedule_chart,
    setting_rows,
)
from orchestrator.report.terminal import cells, styled

Row = tuple[str, str, str]


def show_plan(plan: Plan) -> RenderableType:
    """Tables of what would run; every derived figure carries its reason."""
    parts: list[RenderableType] = [styled(plan.spec.name, "bold"), styled(plan.cluster)]
    for title, rows in (
        ("model and data", _what(plan)),
        ("batch and steps", _how_long(plan)),
        ("learning", learning(plan)),
        ("workers", _where(plan)),
        ("memory per worker", _memory(plan)),
        ("files", _files(plan)),
        ("set by the job", setting_rows(plan)),
        ("defaults", default_rows(plan)),
    ):
        parts.append(table(title, rows))
        if title == "learning":
            parts.append(schedule_chart(plan))
    parts += [styled("DeepSpeed", "bold cyan"), styled(json.dumps(plan.deepspeed), "dim")]
    parts += [styled(f"warning: {text}", "yellow") for text in plan.warnings]
    return Group(*parts)


def table(title: str, rows: Iterator[Row]) -> Table:
    """Rows of (what, value, reason) under a title."""
    shown = Table(
        title=styled(title), title_justify="left", title_style="bold cyan", box=None, pad_edge=False
    )
    for header, style in (("", "bold"), ("", ""), ("", "dim")):
        shown.add_column(header, style=style, overflow="fold")
    shown.show_header = False
    for row in rows:
        shown.add_row(*cells(*row))
    return shown


def _what(plan: Plan) -> Iterator[Row]:
    spec, model = plan.spec, plan.model
    source = spec.model.pretrained or "from its config, random weights"
    yield "model", f"{model.model_type}: {source}", ""
    yield (
        "parameters",
        f"{model.parameters:,}",
        f"{model.trainable:,} trainable, {model.frozen:,} frozen ({spec.tuning.type})",
    )
    if model.adapted_modules:
        which = getattr(spec.tuning, "target_modules", "")
        why = (
            f"tuning.target_modules: {which}" if isinstance(which, str) else "tuning.target_modules"
        )
        yield "adapters on", ", ".join(model.adapted_modules), why
    yield "task", spec.task.type, f"labels: {', '.join(plan.labels)}" if plan.labels else ""
    if (packing := getattr(spec.task, "packing", None)) is not None and "packing" in plan.reasons:
        ways = {True: "position ids", "mask": "a mask of blocks", False: "off"}
        yield "packing", ways[packing], plan.reasons["packing"]
    yield "training rows", _rows(plan.train_data), plan.train_data.folder
    if plan.eval_data:
        yield "evaluation rows", _rows(plan.eval_data), plan.eval_data.folder


def _rows(data: DataStats) -> str:
    return f"{data.rows:,} rows, {data.tokens:,} tokens, longest {data.longest_tokens}"


def _how_long(plan: Plan) -> Iterator[Row]:
    spec, reasons = plan.spec, plan.reasons
    yield (
        "global batch",
        f"{plan.global_batch_size} rows per step",
        reasons.get("global_batch_size", "batch.global_batch_size"),
    )
    product = f"{plan.micro_batch_size} × {plan.accumulation} × {plan.num_workers}"
    filled = plan.micro_batch_size * plan.accumulation * plan.num_workers - plan.global_batch_size
    padding = f"; {filled} places are filled with rows of weight 0" if filled else ""
    yield (
        "micro × accumulation × workers",
        product,
        reasons.get("micro_batch_size", "batch.micro_batch_size") + padding,
    )
    yield (
        "steps per epoch",
        f"{plan.steps_per_epoch:,}",
        f"{plan.train_data.rows:,} rows / {plan.global_batch_size}; the last batch is filled up, no row is lost",
    )
    yield "total steps", f"{plan.total_steps:,}", reasons.get("total_steps", "stop")
    order = spec.data.order
    yield (
        "order",
        f"shuffle {order.shuffle}, seed {spec.seed}",
        ("grouped by length: " if plan.group_by_length else "not grouped by length: ")
        + reasons.get("group_by_length", "data.order.group_by_length"),
    )
    if plan.eval_every_steps:
        yield (
            "evaluation",
            f"every {plan.eval_every_steps:,} steps",
            f"{reasons.get('eval_every_steps', 'evaluation.every_steps')}; best by {plan.metric}",
        )
    else:
        yield "evaluation", "none", reasons.get("eval_every_steps", "")


def _where(plan: Plan) -> Iterator[Row]:
    reasons = plan.reasons
    device = f"{plan.gpus_per_worker:g} GPU, NCCL" if plan.on_gpu else "CPU, gloo"
    yield (
        "workers",
        f"{_workers(plan)} ({device}, {plan.cpus_per_worker} CPUs each)",
        reasons.get("num_workers", "resources.num_workers"),
    )
    yield (
        "rows per worker and step",
        str(rows_per_rank(plan.global_batch_size, plan.num_workers)),
        "",
    )
    yield "ZeRO stage", str(plan.stage), reasons.get("stage", "zero.stage")
    yield (
        "precision",
        "bf16, fp32 master weights" if plan.bf16 else "fp32",
        reasons.get("bf16", "precision"),
    )
    if "reduce_bucket_size" in plan.deepspeed["zero_optimization"]:
        buckets = plan.deepspeed["zero_optimization"]["reduce_bucket_size"]
        yield (
            "bucket",
            f"{buckets:,} elements",
            "a quarter of the trainable ones, 0.5 to 50 million",
        )


def _workers(plan: Plan) -> str:
    fewest, most = plan.worker_range
    return str(plan.num_workers) if fewest == most else f"{plan.num_workers}, {fewest} to {most}"


def _memory(plan: Plan) -> Iterator[Row]:
    for name, size in plan.memory_bytes.items():
        if size:
            yield name, f"{size / GIB:.2f} GiB", ""
    total = sum(plan.memory_bytes.values())
    yield (
        "total",
        f"{total / GIB:.2f} GiB",
        f"of {plan.memory_limit_bytes / GIB:.1f} GiB: {plan.reasons['memory_limit_bytes']}",
    )
    for count in sorted({*plan.worker_range} - {plan.num_workers}):
        other = at_workers(plan, count)
        yield (
            f"total at {count} worker{'s' * (count > 1)}",
            f"{sum(other.memory_bytes.values()) / GIB:.2f} GiB",
            f"{other.micro_batch_size} × {other.accumulation} rows each",
        )


def _more_checkpoints(plan: Plan) -> str:
    """Describe the checkpoints that evaluations add: a better value is saved even if no checkpoint is due."""
    if not plan.eval_every_steps:
        return ""
    before_last = plan.total_steps - 1
    both = math.lcm(plan.eval_every_steps, plan.checkpoint_every_steps)
    more = before_last // plan.eval_every_steps - before_last // both
    return f", and up to {more} at better evaluations," if more else ""


def _files(plan: Plan) -> Iterator[Row]:
    count = -(-plan.total_steps // plan.checkpoint_every_steps)
    yield (
        "checkpoints",
        f"{count}{_more_checkpoints(plan)} × {plan.checkpoint_bytes / GIB:.2f} GiB",
        (
            f"every {plan.checkpoint_every_steps:,} steps, {plan.reasons.get('checkpoint_every_steps', 'checkpoint.every_steps')}; "
            f"{plan.spec.checkpoint.num_to_keep} newest and the best are kept"
        ),
    )
    yield "run folder", plan.run_dir, ""
