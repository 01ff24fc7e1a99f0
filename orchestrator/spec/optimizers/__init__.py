"""The optimizers that a job can name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Tag

from orchestrator.spec.optimizers.adafactor import Adafactor
from orchestrator.spec.optimizers.adam import Adam, AdamW
from orchestrator.spec.optimizers.lion import Lion
from orchestrator.spec.optimizers.muon import Muon
from orchestrator.spec.optimizers.rmsprop import RMSProp
from orchestrator.spec.optimizers.sgd import SGD
from orchestrator.values import by_type

OptimizerSpec = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Adam, Tag("adam")]
    | Annotated[SGD, Tag("sgd")]
    | Annotated[RMSProp, Tag("rmsprop")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Muon, Tag("muon")],
    by_type("adamw"),
]
__all__ = ["SGD", "Adafactor", "Adam", "AdamW", "Lion", "Muon", "OptimizerSpec", "RMSProp"]
