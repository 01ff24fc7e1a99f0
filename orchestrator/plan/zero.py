"""The DeepSpeed configuration. Its JSON keys appear here and nowhere else."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.memory import MemorySetup
from orchestrator.spec import JobSpec

MAX_BUCKET_ELEMENTS = 50_000_000
MIN_BUCKET_ELEMENTS = 500_000


def bucket_elements(spec: JobSpec, trainable: int) -> int:
    """Elements per bucket: a quarter of the trainable ones, within 0.5 and 50 million.

    DeepSpeed's default of 5e8 allocates gigabytes for models that need megabytes. Its stages 1 and 2 refuse an
    odd number.
    """
    if spec.zero.bucket_elements != "auto":
        return spec.zero.bucket_elements
    return max(MIN_BUCKET_ELEMENTS, min(MAX_BUCKET_ELEMENTS, trainable // 8 * 2))


def deepspeed_config(
    spec: JobSpec, setup: MemorySetup, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """Return the config of `deepspeed.initialize`; the optimizer is passed as an object beside it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * setup.world_size,
        "gradient_clipping": spec.gradient_clipping or 0.0,
        "bf16": {"enabled": setup.bf16},
        "zero_optimization": {"stage": setup.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    zero = config["zero_optimization"]
    if setup.stage >= 1:
        zero |= {
            "reduce_bucket_size": setup.bucket_elements,
            "allgather_bucket_size": setup.bucket_elements,
            "overlap_comm": setup.on_gpu,
            "contiguous_gradients": True,
        }
    if setup.stage >= 1 and setup.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if setup.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": setup.bucket_elements,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
        }
        if setup.offload_param:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return config
