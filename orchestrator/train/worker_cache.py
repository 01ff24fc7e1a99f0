"""What a worker keeps from one trial to the next: the untouched model, the evaluation rows.

See docs/decisions/0072-a-base-model-above-2-gib-is-reloaded-for-every-trial.md.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
from typing import Any

import torch

from orchestrator.data.stream import StepRows
from orchestrator.effects import Effect, without
from orchestrator.model.build import build_model
from orchestrator.plan.plan import Plan
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import quantized
from orchestrator.train.state import memory_in_use_bytes

KEPT_MODEL_BYTES = 2 * 2**30
"""A larger model is read anew for every trial; the operating system's file cache holds it anyway."""
SETTLED_TRIALS = 3
"""A worker's memory is what it is after so many trials; what comes later is a heap that comes apart."""
GROWTH = 1.1
"""Times the settled memory at which freed memory is given back."""

logger = logging.getLogger(__name__)


class WorkerCache:
    """One worker's memory of the trials before. A new one is empty: then everything is loaded."""

    def __init__(self) -> None:
        self.eval_rows: dict[Any, list[StepRows]] = {}
        self._key: str | None = None
        self._model: torch.nn.Module | None = None
        self._trials = 0
        self._settled_bytes = 0

    def trial_ended(self) -> None:
        """Give freed memory back to the system where this process has grown; the next trial takes it otherwise."""
        self._trials += 1
        used = memory_in_use_bytes(torch.device("cpu"))
        if self._trials <= SETTLED_TRIALS:
            self._settled_bytes = max(self._settled_bytes, used)
        elif used > GROWTH * self._settled_bytes:
            with contextlib.suppress(AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)
            left = memory_in_use_bytes(torch.device("cpu"))
            logger.info(
                "after trial %d: %d MiB in use, %d MiB given back",
                self._trials,
                used >> 20,
                (used - left) >> 20,
            )

    def model(self, plan: Plan) -> torch.nn.Module:
        """The model that the plan starts from, to be trained by the caller.

        A copy of the kept one where the job's model is the same, bit by bit what loading would give.
        """
        key = plan.spec.model_dump_json(exclude=without(JobSpec, Effect.MODEL)) + repr(plan.labels)
        if self._key != key or self._model is None:
            self._model = None
            model = build_model(plan.spec, plan.labels)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            if size > KEPT_MODEL_BYTES or quantized(plan.spec.tuning):  # those lie on the GPU
                return model
            self._key, self._model = key, model
        return copy.deepcopy(self._model)
