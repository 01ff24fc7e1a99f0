"""Learning-rate schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.effects import DecidedBy
from orchestrator.values import Frozen, by_type

Share = Annotated[float, Field(gt=0, lt=1)]


class Warmup(Frozen):
    """Linear rise of the learning rate from 0 to `optimizer.lr`."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps of warm-up. At most one of `warmup_steps` and `warmup_ratio`."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of all steps."""


class Falling(Warmup):
    """Warm-up, then down to `min_lr_ratio` of the peak, reached as the last step ends."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak rate that is left when the last step ends; no step is spent at rate 0."""


class ConstantSchedule(Warmup):
    """Warm-up, then the peak rate to the end."""

    type: Literal["constant"]


class LinearSchedule(Falling):
    """Warm-up, then a straight line down to `min_lr_ratio` of the peak, reached as the last step ends."""

    type: Literal["linear"] = "linear"


class CosineSchedule(Falling):
    """Warm-up, then half a cosine down to `min_lr_ratio` (Loshchilov & Hutter, arXiv 1608.03983)."""

    type: Literal["cosine"]
    restarts: Annotated[int, Field(ge=0)] = 0
    """Times the rate jumps back to the peak; the cosines between are of one length."""


class PolynomialSchedule(Falling):
    """Warm-up, then (1 − progress)^power down to `min_lr_ratio`."""

    type: Literal["polynomial"]
    power: Annotated[float, Field(gt=0)] = 2.0
    """1 is a straight line; more falls faster at first."""


class ExponentialSchedule(Warmup):
    """Warm-up, then the same factor at every step, down to `min_lr_ratio` of the peak."""

    type: Literal["exponential"]
    min_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the peak rate that is left when the last step ends."""


class StepSchedule(Warmup):
    """Warm-up, then times `gamma` at each milestone (He et al., arXiv 1512.03385)."""

    type: Literal["step"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor at each milestone."""
    milestones: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.75)
    """Shares of the steps after the warm-up at which the rate drops. At most one of `milestones` and `every_steps`."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Drop after each so many steps since the warm-up instead."""


class InverseSqrtSchedule(Warmup):
    """Warm-up of w steps, then √(w / step) (Vaswani et al., arXiv 1706.03762); 1 / √step without one."""

    type: Literal["inverse_sqrt"]


class WSDSchedule(Falling):
    """Warm-up, the peak rate, then a short decay (MiniCPM: Hu et al., arXiv 2404.06395)."""

    type: Literal["wsd"]
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The decay as a share of all steps."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How it decays; `sqrt` is 1 − √progress (Hägele et al., arXiv 2405.18392)."""


class PlateauSchedule(Warmup):
    """Warm-up, then the peak rate, times `factor` whenever evaluation stops getting better."""

    type: Annotated[
        Literal["plateau"],
        DecidedBy(("evaluation.every_steps",)),
        DecidedBy(("evaluation.metric",), unless="metric"),
    ]
    metric: str | None = None
    """The evaluation metric that is watched. Default: `evaluation.metric`."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the rate is multiplied by."""
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
