"""Which values trial k gets: a pure function of the sweep, k and what the trials before it showed.

Nothing is kept between calls, so a resumed sweep proposes what the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator.report.importance import optuna_trial
from orchestrator.report.trial_log import SweepLog
from orchestrator.spec.search_space import Values, drawn, grid, kept, random_values, walk
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


def propose(sweep: SweepSpec, index: int, seen: Sequence[Seen], maximize: bool) -> Values | None:
    """The values of trial `index`; None where a grid has no more.

    Raises OrchestratorError where no draw keeps the constraints.
    """
    match sweep.searcher:
        case GridSearch():
            cells = _cells(sweep.model_dump_json())
            return dict(cells[index]) if index < len(cells) else None
        case RandomSearch():
            return random_values(sweep, index)
        case TPESearch() as tpe:
            ask = _Estimator(sweep, tpe, seen, maximize)
            return kept(sweep, lambda attempt: ask(index, attempt))


@lru_cache(maxsize=4)
def _cells(sweep: str) -> tuple[Values, ...]:
    """All points of a grid, by the sweep's JSON: made once, not for every proposal."""
    return tuple(grid(SweepSpec.model_validate_json(sweep)))


def perturbed(sweep: SweepSpec, values: Values, resample: float, *key: int) -> Values:
    """A neighbour of `values`, drawn by `key`: each number × 0.8 or 1.2, each choice one place on, or anew."""

    def neighbour(attempt: int) -> Values:
        generator = np.random.default_rng([sweep.seed, *key, attempt])

        def draw(path: str, dimension: DimensionSpec) -> Any:
            if path not in values or generator.random() < resample:
                return drawn(generator, dimension)
            return _moved(generator, dimension, values[path])

        return walk(sweep.dimensions(), draw)

    return kept(sweep, neighbour)


def _moved(generator: np.random.Generator, dimension: DimensionSpec, value: Any) -> Any:
    match dimension:
        case Choice(values=choices):
            place = choices.index(value) + int(generator.choice([-1, 1]))
            return choices[min(max(place, 0), len(choices) - 1)]
        case IntUniform(low=low, high=high):
            return int(min(max(round(value * generator.choice(CHANGES)), low), high))
        case Uniform(low=low, high=high) | LogUniform(low=low, high=high):
            return float(min(max(value * generator.choice(CHANGES), low), high))


class _Estimator:
    """Optuna's TPE over everything seen so far; a study is filled anew for every proposal."""

    def __init__(
        self, sweep: SweepSpec, tpe: TPESearch, seen: Sequence[Seen], maximize: bool
    ) -> None:
        self.sweep, self.tpe = sweep, tpe
        self.direction: Any = "maximize" if maximize else "minimize"
        self.seen = [t for t in seen if t.ended and not t.failed and _has_value(t)]

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


def _has_value(trial: Seen) -> bool:
    """Whether its last report is a number; Optuna refuses trials that have ended with another one."""
    return bool(trial.reports) and math.isfinite(trial.reports[-1][1])


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
