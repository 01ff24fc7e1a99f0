"""A search over any field of the job: space, searcher, scheduler, budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from orchestrator.effects import Affects
from orchestrator.values import Frozen, by_type

Scalar = bool | int | float | str | None


class Dimension(Frozen):
    """One searched field."""

    when: Annotated[dict[str, Scalar], Field(default_factory=dict)]
    """Searched only in trials in which these other searched fields have these values."""


class Choice(Dimension):
    """One of a list. A plain YAML list is short for it."""

    type: Literal["choice"] = "choice"
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """The values to choose from: anything the field takes."""


class Uniform(Dimension):
    """A number between two others."""

    type: Literal["uniform"]
    low: float
    """Smallest value."""
    high: float
    """Largest value."""


class LogUniform(Dimension):
    """A number whose logarithm is uniform: for learning rates."""

    type: Literal["log_uniform"]
    low: Annotated[float, Field(gt=0)]
    """Smallest value."""
    high: Annotated[float, Field(gt=0)]
    """Largest value."""


class IntUniform(Dimension):
    """A whole number between two others, both included."""

    type: Literal["int_uniform"]
    low: int
    """Smallest value."""
    high: int
    """Largest value."""


DimensionSpec = Annotated[
    Annotated[Choice, Tag("choice")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("log_uniform")]
    | Annotated[IntUniform, Tag("int_uniform")],
    by_type("choice"),
]


class RandomSearch(Frozen):
    """Independent draws; trial k's depends on `sweep.seed` and k alone."""

    type: Literal["random"] = "random"


class GridSearch(Frozen):
    """Every combination of the choices, the last field fastest."""

    type: Literal["grid"]


class TPESearch(Frozen):
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""

    type: Literal["tpe"]
    startup_trials: Annotated[int, Field(ge=1)] = 10
    """Random draws before the estimator proposes values."""


SearcherSpec = Annotated[
    Annotated[RandomSearch, Tag("random")]
    | Annotated[GridSearch, Tag("grid")]
    | Annotated[TPESearch, Tag("tpe")],
    by_type("random"),
]


class Rungs(Frozen):
    """Steps at which trials are compared, counted in a unit that survives a resume."""

    unit: Literal["steps", "rows", "tokens"] = "steps"
    """Unit of `grace_period`: optimizer steps, training rows or training tokens."""
    grace_period: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """The first rung. `auto`: the last one divided by reduction_factor², at least one step."""


class AshaScheduler(Rungs):
    """Asynchronous successive halving (Li et al., MLSys 2020): at rung grace_period · factorᵏ a trial
    continues if it is among the best 1/factor of the trials that have reached the rung."""

    type: Literal["asha"] = "asha"
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in this many continues after a rung, and the next rung is this many times as far."""


class MedianScheduler(Rungs):
    """Median stopping (Golovin et al., KDD 2017): a trial stops where its best is worse than the median
    of the others' running means."""

    type: Literal["median"]
    min_trials: Annotated[int, Field(ge=1)] = 3
    """Trials to compare with before any is stopped."""


class PbtScheduler(Frozen):
    """Population-based training (Jaderberg et al., arXiv 1711.09846), in generations: after each, the
    worst take over a checkpoint of the best, and their searched fields with a change."""

    type: Literal["pbt"]
    generations: Annotated[int, Field(ge=2)] = 4
    """Equal parts that training is cut into; `num_trials` is the population."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is replaced, and share that it is replaced from."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a field is sampled again instead of changed by a factor of 0.8 or 1.2."""


class NoScheduler(Frozen):
    """Every trial runs to its end."""

    type: Literal["none"]


SchedulerSpec = Annotated[
    Annotated[AshaScheduler, Tag("asha")]
    | Annotated[MedianScheduler, Tag("median")]
    | Annotated[PbtScheduler, Tag("pbt")]
    | Annotated[NoScheduler, Tag("none")],
    by_type("asha"),
]


class BudgetSpec(Frozen):
    """Limits that end a sweep before all trials have run. The best so far is exported all the same."""

    max_time_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds of all launches of the sweep together, the time between them not counted. Running trials commit
    a checkpoint and leave."""
    max_steps_total: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of all trials together."""
    patience_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials that may end in a row without a better best."""


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepSpec(Frozen):
    """Many trials of one job, each with other values of some fields."""

    space: Annotated[dict[str, DimensionSpec | Choices], Field(min_length=1)]
    """Dotted path of a field → what to draw it from: a list, or a `type` with its bounds."""
    constraints: tuple[str, ...] = ()
    """Comparisons between searched fields that every trial keeps: `optimizer.lr * batch.global_batch_size < 0.1`."""
    num_trials: Annotated[int | None, Field(ge=1), Affects()] = None
    """Trials to run. Default: 20, or the size of the grid."""
    searcher: SearcherSpec = RandomSearch()
    """Search algorithm that proposes values."""
    scheduler: SchedulerSpec = AshaScheduler()
    """Scheduler that stops trials early."""
    max_concurrent_trials: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Affects()] = (
        "auto"
    )
    """Trials in flight, each in a worker group of `resources.num_workers`. `auto`: as many as the cluster holds."""
    budget: Annotated[BudgetSpec, Affects()] = BudgetSpec()
    """Limits on the whole sweep."""
    max_trial_failures: Annotated[int, Field(ge=0), Affects()] = 3
    """Lost workers that one trial may cost before it counts as failed."""
    keep_trials: Annotated[int, Field(ge=1), Affects()] = 1
    """Best trials whose checkpoints are kept once they have ended."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the proposals; the trials' own seed is the job's."""

    def dimensions(self) -> dict[str, DimensionSpec]:
        """The space, plain lists read as choices."""
        return {
            path: Choice(values=value, when={}) if isinstance(value, tuple) else value
            for path, value in self.space.items()
        }
