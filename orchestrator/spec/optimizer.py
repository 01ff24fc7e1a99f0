"""Which optimizer moves the weights, and how fast each part of the model moves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.effects import Affects, Effect
from orchestrator.values import Frozen, by_type

Probability = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Implementation = Literal["auto", "deepspeed", "torch"]


OF_STATE = Affects(Effect.CHECKPOINT, Effect.TRAINING)
Momentum = Annotated[Probability, Affects(Effect.TRAINING), Affects(Effect.CHECKPOINT, at=0)]
"""0 keeps no state."""


class Rates(Frozen):
    """Learning rates, whichever the optimizer."""

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


class AdamW(Rates):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    type: Annotated[Literal["adamw"], OF_STATE] = "adamw"
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay; norms and biases are left out of it."""
    implementation: Annotated[Implementation, OF_STATE] = "auto"
    """`deepspeed` takes FusedAdam on a GPU and DeepSpeedCPUAdam for an offloaded optimizer (both compile
    an extension at first use); `auto` does so where a compiler is found, and says which in the plan."""


class Adam(Rates):
    """Adam with its weight decay as an L2 penalty in the gradient (Kingma & Ba, arXiv 1412.6980)."""

    type: Annotated[Literal["adam"], OF_STATE]
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient, so scaled by the second moment as the gradient is; `adamw` has
    it decoupled. Norms and biases are left out of it."""
    implementation: Annotated[Implementation, OF_STATE] = "auto"
    """As for `adamw`."""


class SGD(Rates):
    """Stochastic gradient descent with optional (Nesterov) momentum."""

    type: Annotated[Literal["sgd"], OF_STATE]
    momentum: Momentum = 0.9
    """0 is plain SGD."""
    nesterov: bool = False
    """Look-ahead momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient; norms and biases are left out of it."""


class RMSProp(Rates):
    """Steps divided by a moving root mean square of the gradient (Hinton, Coursera lecture 6e, 2012)."""

    type: Annotated[Literal["rmsprop"], OF_STATE]
    alpha: Probability = 0.99
    """Decay of the mean square."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    momentum: Momentum = 0.0
    """Momentum on the divided gradient."""
    centered: Annotated[bool, OF_STATE] = False
    """Divide by the standard deviation instead (Graves, arXiv 1308.0850)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient; norms and biases are left out of it."""


class Lion(Rates):
    """The sign of an interpolated momentum (Chen et al., arXiv 2302.06675): half of Adam's state."""

    type: Annotated[Literal["lion"], OF_STATE]
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    """Interpolation for the step, and decay of the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled decay, 3 to 10 times more than for AdamW; norms and biases are left out of it."""


class Adafactor(Rates):
    """Adam's second moment as one row and one column per matrix (Shazeer & Stern, arXiv 1804.04235).

    Needs whole matrices, so ZeRO stage 0: from stage 1 on the optimizer sees flat pieces of them.
    """

    type: Annotated[Literal["adafactor"], OF_STATE]
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    """The second moment decays by 1 − step^decay_rate."""
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0
    """Largest root mean square of one matrix's update, in units of `lr`."""
    scale_parameter: bool = False
    """Multiply `lr` by the root mean square of the matrix it moves."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay; norms and biases are left out of it."""


OptimizerSpec = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Adam, Tag("adam")]
    | Annotated[SGD, Tag("sgd")]
    | Annotated[RMSProp, Tag("rmsprop")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Adafactor, Tag("adafactor")],
    by_type("adamw"),
]
