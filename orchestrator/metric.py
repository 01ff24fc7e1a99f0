"""A metric and its direction, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "mae", "wer", "cer"})
"""Metrics to minimize; all others are maximized."""


@dataclass(frozen=True)
class Metric:
    """The name of a metric and its direction. Every comparison of two values goes through it."""

    name: str
    maximize: bool

    @classmethod
    def named(cls, name: str) -> Metric:
        """Return the metric of this name, with the direction that its name implies."""
        return cls(name, name not in LOWER_IS_BETTER)

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Return the direction as Optuna names it."""
        return "maximize" if self.maximize else "minimize"

    @property
    def mode(self) -> Literal["max", "min"]:
        """Return the direction as Ray Tune names it."""
        return "max" if self.maximize else "min"

    def score(self, value: float) -> float:
        """Return a number that is larger for a better value; -inf for one that is not finite."""
        if not math.isfinite(value):
            return -math.inf
        return value if self.maximize else -value

    def is_better(self, value: float, than: float | None) -> bool:
        """Return whether `value` beats `than`; a value that is not finite never does."""
        return math.isfinite(value) and (than is None or self.score(value) > self.score(than))
