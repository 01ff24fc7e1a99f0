"""Learning-rate schedules. Each kind says its factor, its rules and its sources.

The rate is a pure function of the step, so there is nothing to save and a resume is exact. Of `plateau`, which
looks at results, it is one of the evaluations so far too; those are in every checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from orchestrator.effects import DecidedBy
from orchestrator.errors import PlanError, Problem
from orchestrator.metric import Metric
from orchestrator.values import Frozen, by_type

Share = Annotated[float, Field(gt=0, lt=1)]


class Schedule(Frozen, ABC):
    """Linear rise of the learning rate from 0 to `optimizer.lr`, and what follows it."""

    sources: ClassVar[Mapping[str, str]] = {
        "warmup_ratio": "none; Devlin et al., arXiv 1810.04805, A.2, warm up: schedule.warmup_ratio=0.1 does",
    }
    """Field → citation of its default."""
    decided_by_evaluations: ClassVar[bool] = False
    """`evaluation_factor` is not 1 for all values, so some must be made during training."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps of warm-up. At most one of `warmup_steps` and `warmup_ratio`."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """WorkerCache-up as a share of all steps."""

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Return the share of the peak learning rate for optimizer step `step` (0-based) of `total_steps`.

        WorkerCache-up takes steps 0…w−1 through 1/w, 2/w, …, 1, so that no step is spent at rate 0.
        """
        warm = self.total_warmup_steps(total_steps)
        if step < warm:
            return (step + 1) / warm
        return self.factor_after_warmup(step, warm, total_steps)

    @abstractmethod
    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return the share of the peak for a step after the `warm` steps of warm-up.

        Args:
            step: optimizer step, from 0; at least `warm`.
            warm: steps of warm-up.
            total_steps: steps of the run.
        """

    def evaluation_factor(self, values: Sequence[float], metric: Metric) -> float:
        """Return what the rate is multiplied by after evaluations that gave `values`."""
        return 1.0

    def watched_metric(self, metric: str) -> str:
        """Return the metric whose values `evaluation_factor` gets. `metric`: the one that names the best model."""
        return metric

    def describe(self, metric: str) -> str:
        """Return a note for the plan on what the steps alone do not say; empty where they say all."""
        return ""

    def total_warmup_steps(self, total_steps: int) -> int:
        """Return the optimizer steps of warm-up, always less than `total_steps`."""
        steps = self.warmup_steps
        if steps is None:
            steps = round((self.warmup_ratio or 0.0) * total_steps)
        return min(steps, max(total_steps - 1, 0))

    def check(self, total_steps: int) -> None:
        """Raise PlanError where the schedule does not fit `total_steps`."""
        if (self.warmup_steps or 0) >= total_steps:
            raise PlanError(
                f"schedule.warmup_steps = {self.warmup_steps}: there are {total_steps} steps in all, so the rate "
                f"would never reach its peak. Set at most {total_steps - 1}, or schedule.warmup_ratio, or train longer."
            )

    def broken_rules(self, task: str, metrics: Sequence[str]) -> Iterator[Problem]:
        """Problems across this schedule's own fields.

        Args:
            task: the kind of task.
            metrics: those that it reports.
        """
        return iter(())


def _progress(step: int, warm: int, total_steps: int) -> float:
    return (step - warm) / max(total_steps - warm, 1)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


class Falling(Schedule):
    """WorkerCache-up, then down to `min_lr_ratio` of the peak, reached as the last step ends."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak rate that is left when the last step ends; no step is spent at rate 0."""


class ConstantSchedule(Schedule):
    """WorkerCache-up, then the peak rate to the end."""

    type: Literal["constant"]

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return 1."""
        return 1.0


class LinearSchedule(Falling):
    """WorkerCache-up, then a straight line down to `min_lr_ratio` of the peak, reached as the last step ends."""

    sources: ClassVar[Mapping[str, str]] = {
        "type": "down to 0 in a straight line: Devlin et al., arXiv 1810.04805, A.2",
        **Schedule.sources,
    }

    type: Literal["linear"] = "linear"

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return a straight line."""
        low = self.min_lr_ratio
        return low + (1 - low) * (1 - _progress(step, warm, total_steps))


class CosineSchedule(Falling):
    """WorkerCache-up, then half a cosine down to `min_lr_ratio` (Loshchilov & Hutter, arXiv 1608.03983)."""

    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "min_lr_ratio": "down to 0: Loshchilov & Hutter, arXiv 1608.03983",
    }

    type: Literal["cosine"]
    restarts: Annotated[int, Field(ge=0)] = 0
    """Times the rate jumps back to the peak; the cosines between are of one length."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return half a cosine, or one of several. By whole numbers: a restart is at the peak."""
        low, steps, cycles = self.min_lr_ratio, total_steps - warm, self.restarts + 1
        within = ((step - warm) * cycles % steps) / steps if step - warm < steps else 1.0
        return low + (1 - low) * _half_cosine(within)

    def check(self, total_steps: int) -> None:
        """Raise PlanError for more restarts than there is room for: a cosine takes two steps at least."""
        super().check(total_steps)
        room = max((total_steps - self.total_warmup_steps(total_steps)) // 2 - 1, 0)
        if self.restarts > room:
            raise PlanError(
                f"schedule.restarts = {self.restarts}: {total_steps} steps have room for {room} at most, "
                "as each cosine takes two steps or more. Lower it, or train longer."
            )


class PolynomialSchedule(Falling):
    """WorkerCache-up, then (1 − progress)^power down to `min_lr_ratio`."""

    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "power": "a start and no more: no source settles it",
    }

    type: Literal["polynomial"]
    power: Annotated[float, Field(gt=0)] = 2.0
    """1 is a straight line; more falls faster at first."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return a power of what is left."""
        low = self.min_lr_ratio
        return low + (1 - low) * max(1 - _progress(step, warm, total_steps), 0) ** self.power


class ExponentialSchedule(Schedule):
    """WorkerCache-up, then the same factor at every step, down to `min_lr_ratio` of the peak."""

    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "min_lr_ratio": "a start and no more: no source settles it",
    }

    type: Literal["exponential"]
    min_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the peak rate that is left when the last step ends."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return a power of the last step's factor."""
        return self.min_lr_ratio ** _progress(step, warm, total_steps)


class StepSchedule(Schedule):
    """WorkerCache-up, then times `gamma` at each milestone (He et al., arXiv 1512.03385)."""

    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "milestones": "half and three quarters: He et al., arXiv 1512.03385, 4.2, on CIFAR-10",
        "gamma": "He et al., arXiv 1512.03385",
    }

    type: Literal["step"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor at each milestone."""
    milestones: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.75)
    """Shares of the steps after the warm-up at which the rate drops. At most one of `milestones` and `every_steps`."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Drop after each so many steps since the warm-up instead."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return `gamma` to the power of the milestones passed."""
        after, whole = step - warm, total_steps - warm
        if self.every_steps is not None:
            return self.gamma ** (after // self.every_steps)
        drops = sum(after >= math.ceil(share * whole - 1e-9) for share in self.milestones)
        return self.gamma**drops

    def broken_rules(self, task: str, metrics: Sequence[str]) -> Iterator[Problem]:
        """Milestones and a step between drops exclude each other."""
        if self.every_steps and "milestones" in self.model_fields_set:
            yield Problem("schedule.milestones", "excludes schedule.every_steps", "keep one")


class InverseSqrtSchedule(Schedule):
    """WorkerCache-up of w steps, then √(w / step) (Vaswani et al., arXiv 1706.03762); 1 / √step without one."""

    type: Literal["inverse_sqrt"]

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return an inverse square root of the step."""
        return math.sqrt(max(warm, 1) / (step + 1))


class WSDSchedule(Falling):
    """WorkerCache-up, the peak rate, then a short decay (MiniCPM: Hu et al., arXiv 2404.06395)."""

    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "decay_ratio": "Hu et al., arXiv 2404.06395, found 10 % to be enough",
    }

    type: Literal["wsd"]
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The decay as a share of all steps."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay; `sqrt` is 1 − √progress (Hägele et al., arXiv 2405.18392)."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return 1, and a decay at the end."""
        low = self.min_lr_ratio
        return low + (1 - low) * self._decay(step, warm, total_steps)

    def _decay(self, step: int, warm: int, total_steps: int) -> float:
        decay_steps = max(1, min(round(self.decay_ratio * total_steps), total_steps - warm))
        progress = max(0.0, (step - (total_steps - decay_steps)) / decay_steps)
        match self.shape:
            case "linear":
                return 1 - progress
            case "cosine":
                return _half_cosine(progress)
            case "sqrt":
                return 1 - math.sqrt(progress)

    def broken_rules(self, task: str, metrics: Sequence[str]) -> Iterator[Problem]:
        """WorkerCache-up and decay fit in one run."""
        warm = self.warmup_ratio or 0.0
        if self.decay_ratio + warm > 1:
            yield Problem(
                "schedule.decay_ratio",
                f"leaves no room for schedule.warmup_ratio = {self.warmup_ratio}",
                f"at most {1 - warm:g}",
                self.decay_ratio,
            )


class PlateauSchedule(Schedule):
    """WorkerCache-up, then the peak rate, times `factor` whenever evaluation stops getting better."""

    decided_by_evaluations = True
    sources: ClassVar[Mapping[str, str]] = {
        **Schedule.sources,
        "factor": "a start and no more: torch's default is 0.1 after 10, for longer runs",
        "patience": "a start and no more: torch's default is 0.1 after 10, for longer runs",
    }

    type: Annotated[
        Literal["plateau"],
        DecidedBy(("evaluation.every_steps",)),
        DecidedBy(("evaluation.metric",), unless="metric"),
    ]
    metric: str | None = None
    """The evaluation metric that is watched. Default: `evaluation.metric`."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor of the learning rate at each reduction."""
    patience: Annotated[int, Field(ge=1)] | None = 2
    """Evaluations in a row without a better value before the rate drops; null: `thresholds` alone count."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A value counts as better when it beats the best by more than this."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Evaluations after a drop that are not counted."""
    thresholds: tuple[float, ...] = ()
    """Values of the metric; the rate drops once as each is reached, as for a loss below 0.5."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate never falls below this share of the peak."""

    def factor_after_warmup(self, step: int, warm: int, total_steps: int) -> float:
        """Return 1: evaluations decide the rest."""
        return 1.0

    def evaluation_factor(self, values: Sequence[float], metric: Metric) -> float:
        """Return the product of all drops. A value that is not finite counts as no better."""
        left = list(self.thresholds)
        best, waited, cooling, drops = -math.inf, 0, 0, 0
        for value in map(metric.score, values):
            reached = [t for t in left if value >= metric.score(t)]
            drops += len(reached)
            left = [t for t in left if t not in reached]
            better = value > best + self.min_delta
            best = max(best, value) if better else best
            waited = 0 if better or cooling else waited + 1
            cooling = max(0, cooling - 1)
            if self.patience is not None and waited >= self.patience:
                drops, waited, cooling = drops + 1, 0, self.cooldown
        return max(self.factor**drops, self.min_lr_ratio)

    def watched_metric(self, metric: str) -> str:
        """Return the schedule's own metric where it has one."""
        return self.metric or metric

    def describe(self, metric: str) -> str:
        """Return when the rate drops."""
        watched = self.watched_metric(metric)
        when = [f"{watched} reaches {t:g}" for t in self.thresholds]
        if self.patience is not None:
            when.append(f"{watched} got no better in {self.patience} evaluations")
        return f"at most: times {self.factor:g} whenever {', or '.join(when)}"

    def broken_rules(self, task: str, metrics: Sequence[str]) -> Iterator[Problem]:
        """Something must be watched, and the task must report it."""
        if self.patience is None and not self.thresholds:
            yield Problem("schedule.patience", "null needs schedule.thresholds", "patience: 2")
        if self.metric is not None and self.metric not in metrics:
            fix = f"choose from: {', '.join(metrics)}"
            yield Problem("schedule.metric", f"{task} does not report it", fix, self.metric)


ScheduleSpec = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[PolynomialSchedule, Tag("polynomial")]
    | Annotated[ExponentialSchedule, Tag("exponential")]
    | Annotated[StepSchedule, Tag("step")]
    | Annotated[InverseSqrtSchedule, Tag("inverse_sqrt")]
    | Annotated[WSDSchedule, Tag("wsd")]
    | Annotated[PlateauSchedule, Tag("plateau")],
    by_type("linear"),
]
