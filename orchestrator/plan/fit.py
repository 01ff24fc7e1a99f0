"""The lowest ZeRO stage and the largest micro-batch that fit, or what would make them fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import PlanError
from orchestrator.plan.cluster import GIB
from orchestrator.plan.memory import MemorySetup, ModelStats, Stage, memory_bytes
from orchestrator.plan.regularization import passes_per_row
from orchestrator.plan.resources import Workers
from orchestrator.plan.zero import bucket_elements
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import quantized, virtual_tokens

MEMORY_SHARE = 0.85
"""Share of a worker's memory that the plan fills; the rest is for what the estimate does not know."""
LORA_SHARE = 0.02
"""Share of the weights that adapters train, for a first guess before they are counted."""
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Load:
    """What a worker must hold, and the memory it has."""

    spec: JobSpec
    model: ModelStats
    workers: Workers
    bf16: bool
    rows: int
    """A worker's rows of one global batch."""
    tokens_per_row: int
    limit_bytes: int
    target_tokens_per_row: int = 0
    """Those that a decoder reads beside an encoder's."""

    @property
    def room_bytes(self) -> int:
        return int(self.limit_bytes * MEMORY_SHARE)

    def setup(self, stage: Stage) -> MemorySetup:
        """Return how the model is held at a ZeRO stage."""
        spec = self.spec
        return MemorySetup(
            world_size=self.workers.count,
            stage=stage,
            bf16=self.bf16,
            optimizer_states=optimizer_states(spec, self.model)
            + spec.regularization.averaging.keeps_average,
            averages=spec.regularization.averaging.keeps_average,
            offload_optimizer=spec.zero.offload_optimizer == "cpu",
            offload_param=spec.zero.offload_param == "cpu",
            bucket_elements=bucket_elements(spec, self.model.moving),
            gradient_checkpointing=spec.gradient_checkpointing,
            on_gpu=self.workers.on_gpu,
            all_logits=spec.task.all_logits,
            distils=spec.distillation is not None,
        )

    def fits(self, stage: Stage, rows: int) -> bool:
        """Tell whether micro-batches of `rows` rows do at a ZeRO stage."""
        return sum(self.need(self.model, self.setup(stage), rows).values()) <= self.room_bytes

    def need(self, model: ModelStats, setup: MemorySetup, rows: int) -> dict[str, int]:
        """Bytes of a worker, for micro-batches of `rows` of the longest rows."""
        rows *= passes_per_row(self.spec)
        tokens = self.tokens_per_row + virtual_tokens(self.spec.tuning)
        return memory_bytes(model, setup, rows, tokens, self.target_tokens_per_row)


def fit(load: Load, reasons: dict[str, str], stage: Stage | None = None) -> tuple[MemorySetup, int]:
    """(how the model is held, rows per micro-batch), at the ZeRO stage given or the lowest that fits.

    Raises PlanError, with the changes that help, where nothing fits.
    """
    wanted = load.spec.batch.micro_batch_size
    fewest = 1 if wanted == "auto" else min(wanted, load.rows)
    if stage is None:
        stage = _stage(load, fewest, reasons)
    if not load.fits(stage, fewest):
        raise PlanError(_too_big(load, stage, fewest))
    return load.setup(stage), fewest if wanted != "auto" else _micro_rows(load, stage, reasons)


def _stage(load: Load, rows: int, reasons: dict[str, str]) -> Stage:
    zero = load.spec.zero
    if zero.stage != "auto":
        return zero.stage
    lowest = _lowest_stage(load.spec)
    highest = 2 if quantized(load.spec.tuning) else 3
    stages = [s for s in STAGES if lowest <= s <= highest] if load.workers.count > 1 else [lowest]
    if load.spec.optimizer.whole_matrices:
        reasons["stage"] = load.spec.optimizer.whole_matrices
        return 0
    reasons["stage"] = f"the lowest that fits {load.room_bytes / GIB:.1f} GiB per worker"
    return next((s for s in stages if load.fits(s, rows)), stages[-1])


def _micro_rows(load: Load, stage: Stage, reasons: dict[str, str]) -> int:
    rows = load.rows
    while not load.fits(stage, rows):
        rows = -(-rows // 2)
    micro = math.ceil(load.rows / math.ceil(load.rows / rows))
    reasons["micro_batch_size"] = (
        "a worker's whole share of the batch fits"
        if micro == load.rows
        else f"the most rows of {load.tokens_per_row} tokens that fit {load.room_bytes / GIB:.1f} GiB"
    )
    return micro


def _lowest_stage(spec: JobSpec) -> Stage:
    if spec.zero.offload_param == "cpu":
        return 3
    return 1 if spec.zero.offload_optimizer == "cpu" else 0


def optimizer_states(spec: JobSpec, model: ModelStats) -> float:
    """Return the fp32 values the optimizer keeps per trained element, a mean over all of them."""
    share = model.hidden_matrices / max(model.moving, 1)
    inside, others = (spec.optimizer.states_per_element(hidden) for hidden in (True, False))
    return others + share * (inside - others)


def _too_big(load: Load, stage: Stage, rows: int) -> str:
    """Says what is missing and which change makes it fit: alone, or else which ones together."""
    model, setup = load.model, load.setup(stage)
    room = load.room_bytes

    def need(helps: Sequence[_Change]) -> int:
        changed = setup.model_copy(update={k: v for c in helps for k, v in c.setup.items()})
        tuned = LORA_SHARE if any(c.lora for c in helps) else 1
        facts = model.model_copy(update={"trainable": int(model.trainable * tuned)})
        fewer = 1 if any(c.one_row for c in helps) else rows
        return sum(load.need(facts, changed, fewer).values())

    changes = _changes(load.spec, setup, rows)
    fixes = [change.text for change in changes if need([change]) <= room]
    together = next((n for n in range(2, len(changes) + 1) if need(changes[:n]) <= room), 0)
    if not fixes and together:
        fixes = [" and ".join(change.text for change in changes[:together])]
    if not fixes:
        fixes = ["a smaller model, a shorter data.max_length_tokens or larger workers"]
    return (
        f"one worker needs {need([]) / GIB:.1f} GiB at ZeRO stage {setup.stage} with {rows} row(s) of "
        f"{load.tokens_per_row} tokens; {room / GIB:.1f} GiB is available. What helps: {', or '.join(fixes)}."
    )


@dataclass(frozen=True)
class _Change:
    """A change to the job that saves memory, and what it does to the estimate."""

    text: str
    setup: dict[str, Any] = field(default_factory=dict)
    one_row: bool = False
    lora: bool = False


def _changes(spec: JobSpec, setup: MemorySetup, rows: int) -> list[_Change]:
    """Yield changes that save memory, the least intrusive first."""
    highest = 3 if setup.world_size > 1 else max(1, setup.stage)
    if quantized(spec.tuning):
        highest = 2
    offload = {"offload_optimizer": True, "stage": setup.stage or highest}
    staged = " zero.stage=auto" if spec.zero.stage == 0 else ""
    pinned = spec.zero.stage != "auto" and setup.stage < highest and setup.world_size > 1
    offers = (
        (rows > 1, _Change("batch.micro_batch_size=auto", one_row=True)),
        (
            not spec.gradient_checkpointing,
            _Change("gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ),
        (not setup.bf16, _Change("precision=bf16", {"bf16": True})),
        (
            setup.on_gpu and not setup.offload_optimizer and not spec.optimizer.whole_matrices,
            _Change(f"zero.offload_optimizer=cpu{staged}", offload),
        ),
        (pinned, _Change("zero.stage=auto", {"stage": highest})),
        (
            spec.tuning.type == "full" and spec.model.config is None,
            _Change("tuning.type=lora", lora=True),
        ),
    )
    return [change for possible, change in offers if possible]
