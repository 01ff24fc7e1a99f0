"""Learning-rate schedule, batch and ZeRO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.values import Frozen, by_type


class Warmup(Frozen):
    """Linear rise of the learning rate from 0 to `optimizer.lr`."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps of warm-up. At most one of `warmup_steps` and `warmup_ratio`."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of all steps."""


class ConstantSchedule(Warmup):
    """Warm-up, then the peak rate to the end."""

    type: Literal["constant"]


class LinearSchedule(Warmup):
    """Warm-up, then a straight line down to `min_lr_ratio` of the peak, reached as the last step ends."""

    type: Literal["linear"] = "linear"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak rate that is left when the last step ends; no step is spent at rate 0."""


class CosineSchedule(Warmup):
    """Warm-up, then half a cosine down to `min_lr_ratio` (Loshchilov & Hutter, arXiv 1608.03983)."""

    type: Literal["cosine"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak rate that is left when the last step ends; no step is spent at rate 0."""


ScheduleSpec = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")],
    by_type("linear"),
]


class BatchSpec(Frozen):
    """How many rows make one optimizer step. The split over workers never changes the mathematics."""

    global_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per optimizer step over all workers. `auto`: 32 (16 sequences for causal LM), capped by the data."""
    micro_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per forward pass of one worker. `auto`: the largest that the memory estimate allows."""


class ZeroSpec(Frozen):
    """DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    """What is sharded: 0 nothing, 1 optimizer, 2 gradients too, 3 parameters too. `auto`: the lowest that fits."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps optimizer state in host memory (GPU workers, stage 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """`cpu` keeps parameters in host memory (GPU workers, stage 3)."""
    bucket_elements: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Elements per communication bucket. `auto`: sized to the model (DeepSpeed's 5e8 wastes memory on small ones)."""
