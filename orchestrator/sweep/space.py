"""Which values trial k gets: a pure function of the sweep, k and what the trials before it showed.

Nothing is kept between calls, so a resumed sweep proposes what the uninterrupted one would have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from orchestrator.errors import OrchestratorError
from orchestrator.report.importance import optuna_trial
from orchestrator.report.trial_log import SweepLog
from orchestrator.spec.expression import Expression
from orchestrator.spec.sweep import (
    Choice,
    DimensionSpec,
    GridSearch,
    IntUniform,
    LogUniform,
    RandomSearch,
    SweepSpec,
    TPESearch,
    Uniform,
)

Values = dict[str, Any]
"""Dotted path → value."""
MOST_DRAWS = 1000
"""Draws that may break the constraints before the space is taken for empty."""
CHANGES = (0.8, 1.2)
"""Factors by which population-based training moves a value (Jaderberg et al., arXiv 1711.09846)."""


@dataclass(frozen=True)
class Seen:
    """What a searcher knows of a trial: its values, its metric by step, and whether it failed."""

    values: Values
    reports: tuple[tuple[int, float], ...]
    ended: bool
    failed: bool = False


def seen_in(log: SweepLog) -> list[Seen]:
    """All trials as a searcher sees them, in the order they were proposed."""
    return [
        Seen(
            t.values,
            tuple((step, log.value(t, step)) for step in sorted(t.reports)),
            t.status is not None,
            t.status not in (None, "finished", "pruned"),
        )
        for t in log.trials.values()
    ]


class Draw(Protocol):
    """One random value of a dimension."""

    def __call__(self, path: str, dimension: DimensionSpec) -> Any: ...


def default_trials(sweep: SweepSpec) -> int:
    """Trials to run where the job does not say."""
    if sweep.num_trials is not None:
        return sweep.num_trials
    return sum(1 for _ in grid(sweep)) if isinstance(sweep.searcher, GridSearch) else 20


def propose(sweep: SweepSpec, index: int, seen: Sequence[Seen], maximize: bool) -> Values | None:
    """The values of trial `index`; None where a grid has no more.

    Raises OrchestratorError where no draw keeps the constraints.
    """
    match sweep.searcher:
        case GridSearch():
            return next(itertools.islice(grid(sweep), index, None), None)
        case RandomSearch():
            return _kept(sweep, lambda attempt: _random(sweep, index, attempt))
        case TPESearch() as tpe:
            ask = _Estimator(sweep, tpe, seen, maximize)
            return _kept(sweep, lambda attempt: ask(index, attempt))


def grid(sweep: SweepSpec) -> Iterator[Values]:
    """Every combination that keeps the constraints, the last field fastest, none twice."""
    dimensions = sweep.dimensions()
    choices = [d.values for d in dimensions.values() if isinstance(d, Choice)]
    given: list[Values] = []
    for combination in itertools.product(*choices):
        by_path = dict(zip(dimensions, combination, strict=True))
        values = walk(dimensions, lambda path, _, row=by_path: row[path])  # type: ignore[misc]
        if keeps(sweep, values) and values not in given:
            given.append(values)
            yield values


def walk(dimensions: Mapping[str, DimensionSpec], draw: Draw) -> Values:
    """A value for every dimension whose `when` holds; those it names come first."""
    values: Values = {}
    waiting = dict(dimensions)
    while waiting:
        ready = [p for p, d in waiting.items() if not d.when.keys() & waiting.keys()]
        for path in ready or list(waiting):  # a circle of conditions: none of them holds
            dimension = waiting.pop(path)
            if ready and all(values.get(k) == v for k, v in dimension.when.items()):
                values[path] = draw(path, dimension)
    return {path: values[path] for path in dimensions if path in values}


def keeps(sweep: SweepSpec, values: Values) -> bool:
    """Whether the values keep every constraint."""
    return all(Expression(text).holds(values) for text in sweep.constraints)


def perturbed(sweep: SweepSpec, values: Values, resample: float, *key: int) -> Values:
    """A neighbour of `values`, drawn by `key`: each number × 0.8 or 1.2, each choice one place on, or anew."""

    def neighbour(attempt: int) -> Values:
        generator = np.random.default_rng([sweep.seed, *key, attempt])

        def draw(path: str, dimension: DimensionSpec) -> Any:
            if path not in values or generator.random() < resample:
                return _drawn(generator, dimension)
            return _moved(generator, dimension, values[path])

        return walk(sweep.dimensions(), draw)

    return _kept(sweep, neighbour)


def _moved(generator: np.random.Generator, dimension: DimensionSpec, value: Any) -> Any:
    match dimension:
        case Choice(values=choices):
            place = choices.index(value) + int(generator.choice([-1, 1]))
            return choices[min(max(place, 0), len(choices) - 1)]
        case IntUniform(low=low, high=high):
            return int(min(max(round(value * generator.choice(CHANGES)), low), high))
        case Uniform(low=low, high=high) | LogUniform(low=low, high=high):
            return float(min(max(value * generator.choice(CHANGES), low), high))


def _kept(sweep: SweepSpec, draw: Any) -> Values:
    for attempt in range(MOST_DRAWS):
        values: Values = draw(attempt)
        if keeps(sweep, values):
            return values
    raise OrchestratorError(
        f"sweep.constraints: none of {MOST_DRAWS} draws keeps {list(sweep.constraints)}. "
        "Widen the space or drop a constraint."
    )


def _random(sweep: SweepSpec, index: int, attempt: int) -> Values:
    generator = np.random.default_rng([sweep.seed, index, attempt])
    return walk(sweep.dimensions(), lambda _, dimension: _drawn(generator, dimension))


def _drawn(generator: np.random.Generator, dimension: DimensionSpec) -> Any:
    match dimension:
        case Choice(values=choices):
            return choices[int(generator.integers(len(choices)))]
        case IntUniform(low=low, high=high):
            return int(generator.integers(low, high + 1))
        case Uniform(low=low, high=high):
            return float(generator.uniform(low, high))
        case LogUniform(low=low, high=high):
            return float(math.exp(generator.uniform(math.log(low), math.log(high))))


class _Estimator:
    """Optuna's TPE over everything seen so far; a study is filled anew for every proposal."""

    def __init__(
        self, sweep: SweepSpec, tpe: TPESearch, seen: Sequence[Seen], maximize: bool
    ) -> None:
        self.sweep, self.tpe = sweep, tpe
        self.direction: Any = "maximize" if maximize else "minimize"
        self.seen = [t for t in seen if t.ended and t.reports and not t.failed]

    def __call__(self, index: int, attempt: int) -> Values:
        study, dimensions = self._study(index, attempt), self.sweep.dimensions()
        trial = study.ask()
        return walk(dimensions, lambda path, dimension: _suggested(trial, path, dimension))

    def _study(self, index: int, attempt: int) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        seed = int(np.random.SeedSequence([self.sweep.seed, index, attempt]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(n_startup_trials=self.tpe.startup_trials, seed=seed)
        study = optuna.create_study(direction=self.direction, sampler=sampler)
        dimensions = {p: d.model_dump() for p, d in self.sweep.dimensions().items()}
        study.add_trials([optuna_trial(dimensions, t.values, t.reports) for t in self.seen])
        return study


def _suggested(trial: Any, path: str, dimension: DimensionSpec) -> Any:
    match dimension:
        case Choice(values=choices):
            return choices[trial.suggest_categorical(path, list(range(len(choices))))]
        case IntUniform(low=low, high=high):
            return trial.suggest_int(path, low, high)
        case Uniform(low=low, high=high):
            return trial.suggest_float(path, low, high)
        case LogUniform(low=low, high=high):
            return trial.suggest_float(path, low, high, log=True)
