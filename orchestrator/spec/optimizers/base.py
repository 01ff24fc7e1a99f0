"""What an optimizer says of itself: how it is built, what it keeps, what it needs, its learning rate."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.errors import Problem
from orchestrator.values import Frozen

if TYPE_CHECKING:
    import torch

Probability = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
OF_STATE = Affects(Effect.CHECKPOINT, Effect.TRAINING)
Momentum = Annotated[Probability, Affects(Effect.TRAINING), Affects(Effect.CHECKPOINT, at=0)]
"""0 keeps no state."""


class DefaultLr(NamedTuple):
    """A peak learning rate that the job leaves open, and its citation."""

    lr: float
    source: str


class Implementation(NamedTuple):
    """The class that steps the weights, by its dotted path, and why it is that one (may be empty)."""

    path: str
    reason: str = ""


class Optimizer(Frozen, ABC):
    """A kind of optimizer. Nothing outside this package asks which kind it is.

    The engine gets the object that `build` returns, so no kind has a name in DeepSpeed's JSON.
    """

    sources: ClassVar[Mapping[str, str]] = {}
    """Field → citation of its default."""
    whole_matrices: ClassVar[str] = ""
    """Why the optimizer needs whole matrices, as a clause; empty where it works element by element. ZeRO 1 to 3
    and offloading hand out flat pieces of the weights, so such an optimizer runs at stage 0."""

    lr: Rate | Literal["auto"] = "auto"
    """Peak learning rate, before and beside what the schedule makes of it. `auto`: the usual one for this
    kind of tuning; the plan says which, and whose."""
    layer_decay: Annotated[
        float, Field(gt=0, le=1), Affects(Effect.TRAINING), Affects(Effect.CHECKPOINT, at=1)
    ] = 1.0
    """Peak rate of a layer as a share of the one above; the embeddings have the lowest, the head has
    `lr` (Howard & Ruder, arXiv 1801.06146; Clark et al., arXiv 2003.10555, use 0.8). 1 is one rate for all."""
    head_lr: Annotated[
        Rate | None, Affects(Effect.TRAINING), Affects(Effect.CHECKPOINT, at=None)
    ] = None
    """Peak learning rate of the task's head. Default: `lr`."""

    @abstractmethod
    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return the fp32 values that are kept for each element of a trained parameter.

        Args:
            hidden_matrix: whether it is a matrix inside the body of the model; embeddings, heads, vectors and
                convolutions are not.
        """

    def group_settings(self, hidden_matrix: bool) -> dict[str, Any]:
        """Return what a parameter group holds beside rate and decay; parameters that differ in it get groups
        of their own. Values must be hashable."""
        return {}

    @abstractmethod
    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return the class that steps the weights.

        Args:
            on_gpu: whether the workers have GPUs.
            offloaded: whether the optimizer's state lies in host memory.
        """

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return the arguments of the class at `path` beside the groups, which hold rate and decay."""
        return {}

    def build(self, path: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer over `groups` of parameters; imports torch.

        Args:
            path: the class, as `implementation_on` gave it when the job was planned.
            groups: torch's parameter groups, with `lr` and `weight_decay`.
            lr: peak learning rate.
        """
        module, _, name = path.rpartition(".")
        optimizer_class = getattr(importlib.import_module(module), name)
        built: torch.optim.Optimizer = optimizer_class(groups, **self.arguments(path, lr))
        return built

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return the peak learning rate of a job that leaves it open.

        Args:
            adam: the usual one of Adam's family for this task, model and kind of tuning.
            tuning: the kind of tuning.
        """
        return adam

    def broken_rules(self) -> Iterator[Problem]:
        """Problems across this optimizer's own fields."""
        return iter(())
