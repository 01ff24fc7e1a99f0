"""Averages of the weights. Each kind says how far the average moves at each step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from orchestrator.values import Frozen, by_type


class Averaging(Frozen, ABC):
    """A kind of average. Nothing outside this file asks which kind it is."""

    sources: ClassVar[Mapping[str, str]] = {}
    """Field → citation of its default."""
    keeps_average: ClassVar[bool] = True
    """An average is kept beside the weights: one fp32 value per trained element."""

    @abstractmethod
    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return how far the average moves towards the weights after a step: 1 copies them, 0 leaves it.

        Args:
            step: optimizer step, from 0.
            total_steps: steps of the run.
            steps_per_epoch: steps of one epoch.
        """

    @abstractmethod
    def describe(self, total_steps: int, steps_per_epoch: int) -> str:
        """Return what is averaged, for the plan."""

    def warnings(self, total_steps: int, steps_per_epoch: int) -> Iterator[str]:
        """Yield warnings on averages that would average nothing."""
        return iter(())


class NoAveraging(Averaging):
    """The weights as they are after the last step."""

    keeps_average = False

    type: Literal["none"] = "none"

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return 0."""
        return 0.0

    def describe(self, total_steps: int, steps_per_epoch: int) -> str:
        """Return that there is none."""
        return "none"


class EMA(Averaging):
    """Exponential moving average of the weights after every step; at its start shorter, by
    (1 + step) / (10 + step), so that the first weights fade (as in TensorFlow's)."""

    sources: ClassVar[Mapping[str, str]] = {
        "decay": "TensorFlow's advice for its ExponentialMovingAverage: 0.999, 0.9999",
    }

    type: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that stays at each step; about 1 / (1 − decay) steps count."""

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return a constant share, larger at the start."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    def describe(self, total_steps: int, steps_per_epoch: int) -> str:
        """Return the decay."""
        return f"ema, decay {self.decay:g}"


class SWA(Averaging):
    """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407): the plain mean of the weights at
    regular steps near the end, best with a rate that stays high, as under `schedule.type: constant`."""

    sources: ClassVar[Mapping[str, str]] = {
        "start_ratio": "Izmailov et al., arXiv 1803.05407, 4, at 75 % of the budget",
    }

    type: Literal["swa"]
    start_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of all steps after which weights are averaged."""
    every_steps: Annotated[int, Field(ge=1)] | Literal["epoch", "auto"] = "auto"
    """Steps between the weights that are averaged. `auto`: an `epoch`, or a tenth of what is left after
    `start_ratio` where that is less."""

    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return 1 / n at the n-th point, and 1 before the second one: what is evaluated are the weights then."""
        start, every, _ = self._points(total_steps, steps_per_epoch)
        since = step + 1 - start
        if since < every:
            return 1.0
        return 0.0 if since % every else every / since

    def describe(self, total_steps: int, steps_per_epoch: int) -> str:
        """Return the points that are averaged."""
        start, every, points = self._points(total_steps, steps_per_epoch)
        return f"swa: {points} points after step {start:,}, every {every:,} steps"

    def warnings(self, total_steps: int, steps_per_epoch: int) -> Iterator[str]:
        """Yield a warning where fewer than two points are averaged."""
        start, every, points = self._points(total_steps, steps_per_epoch)
        if points < 2:
            what = f"one point, step {start + every:,}" if points else "nothing"
            yield (
                f"regularization.averaging is the mean of {what}: {total_steps - start:,} steps are left after step "
                f"{start:,}, a point every {every:,}. Set every_steps or start_ratio lower."
            )

    def _points(self, total_steps: int, steps_per_epoch: int) -> tuple[int, int, int]:
        """Return (steps before there is anything to average, steps between points, number of points)."""
        start = math.floor(self.start_ratio * total_steps)
        match self.every_steps:
            case "auto":
                every = min(steps_per_epoch, max(1, (total_steps - start) // 10))
            case "epoch":
                every = steps_per_epoch
            case steps:
                every = steps
        return start, every, (total_steps - start) // every


AveragingSpec = Annotated[
    Annotated[NoAveraging, Tag("none")] | Annotated[EMA, Tag("ema")] | Annotated[SWA, Tag("swa")],
    by_type("none"),
]
