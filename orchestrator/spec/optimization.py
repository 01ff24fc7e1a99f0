"""Batch and ZeRO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.values import Frozen


class BatchSpec(Frozen):
    """Rows of one optimizer step. The split over workers never changes the mathematics."""

    global_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per optimizer step over all workers. `auto`: 32 (16 sequences for causal LM), capped by the data."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows per forward pass of one worker. `auto`: the largest that the memory estimate allows."""


class ZeroSpec(Frozen):
    """DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    """Sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too. `auto`: the lowest stage that fits."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps optimizer state in host memory (GPU workers, stage 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """`cpu` keeps parameters in host memory (GPU workers, stage 3)."""
    bucket_elements: Annotated[int, Field(ge=2, multiple_of=2)] | Literal["auto"] = "auto"
    """Elements per communication bucket, an even number. `auto`: sized to the model (DeepSpeed's 5e8 wastes memory on
    small ones)."""
