"""Distributed fine-tuning on Ray: one YAML says what, the product plans it and runs it.

    from orchestrator import load_spec, make_plan, train

    spec = load_spec("jobs/quickstart.yaml", ["optimizer.lr=3e-5"])
    print(make_plan(spec).total_steps)
    outcome = train(spec)

Names are loaded when they are first used: importing this package imports nothing heavy.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.product import VERSION

if TYPE_CHECKING:
    from orchestrator.api import (
        Outcome,
        Plan,
        SweepOutcome,
        evaluate,
        export,
        find_run,
        make_plan,
        make_sweep_plan,
        predict,
        prepare,
        report,
        sweep,
        train,
    )
    from orchestrator.spec import JobSpec, load_spec

__version__ = VERSION
__all__ = [
    "JobSpec", "Outcome", "Plan", "SweepOutcome", "evaluate", "export", "find_run", "load_spec",
    "make_plan", "make_sweep_plan", "predict", "prepare", "report", "sweep", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("JobSpec", "load_spec"):
        return getattr(importlib.import_module("orchestrator.spec"), name)
    if name in __all__:
        return getattr(importlib.import_module("orchestrator.api"), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")


class _Package(ModuleType):
    """Rooms that are called like verbs (`train`, `report`, `sweep`) do not hide the verbs: Python sets a
    package that it imports as an attribute of this one, before `__getattr__` is ever asked."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
