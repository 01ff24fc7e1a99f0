"""Distributed fine-tuning on Ray: one YAML says what, the product plans it and runs it.

    from orchestrator import load_spec, make_plan, train

    spec = load_spec("jobs/quickstart.yaml", ["optimizer.lr=3e-5"])
    print(make_plan(spec).total_steps)
    outcome = train(spec)

Names are loaded when they are first used: importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import (
        Outcome,
        Plan,
        evaluate,
        export,
        make_plan,
        predict,
        prepare,
        report,
        train,
    )
    from orchestrator.spec import JobSpec, load_spec

__version__ = "0.1.0"
__all__ = [
    "JobSpec", "Outcome", "Plan", "evaluate", "export", "load_spec", "make_plan", "predict",
    "prepare", "report", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("JobSpec", "load_spec"):
        return getattr(importlib.import_module("orchestrator.spec"), name)
    if name in __all__:
        return getattr(importlib.import_module("orchestrator.api"), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
