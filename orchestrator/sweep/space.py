"""Which values trial k gets: a pure function of the sweep, k and what the trials that ended before it showed.

So a resumed sweep proposes what the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator.metric import Metric
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


class Past:
    """Trials that a searcher learns from, in the order of their ends. It only ever grows, with its log."""

    def __init__(self, sweep: SweepSpec, metric: Metric) -> None:
        self.sweep = sweep
        self._direction = metric.direction
        self._read = 0
        self._study: Any = None

    def follow(self, log: SweepLog) -> None:
        """Add what has ended since the last time."""
        news, self._read = log.order[self._read :], len(log.order)
        for trial in [log.trials[name] for kind, name, _ in news if kind == "end"]:
            if trial.status in ("finished", "pruned"):
                self.add(trial.values, [(s, log.value(trial, s)) for s in sorted(trial.reports)])

    def add(self, values: Values, reports: Sequence[tuple[int, float]]) -> None:
        """A trial that ended, with its metric by step. One without a number at its end teaches nothing."""
        if isinstance(self.sweep.searcher, TPESearch) and reports and math.isfinite(reports[-1][1]):
            dimensions = {p: d.model_dump() for p, d in self.sweep.dimensions().items()}
            self.study().add_trial(optuna_trial(dimensions, values, reports))

    def study(self) -> Any:
        """All of them, as Optuna keeps them."""
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self._study = optuna.create_study(direction=self._direction)
        return self._study


def propose(sweep: SweepSpec, index: int, past: Past) -> Values | None:
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
            return kept(sweep, lambda attempt: _estimated(sweep, tpe, past.study(), index, attempt))


@lru_cache(maxsize=4)
def _cells(sweep: str) -> tuple[Values, ...]:
    """All points of a grid, by the sweep's JSON: made once, not for every proposal."""
    return tuple(grid(SweepSpec.model_validate_json(sweep)))


def perturbed(sweep: SweepSpec, values: Values, resample: float, *key: int) -> Values:
    """A neighbor of `values`, drawn by `key`: each number × 0.8 or 1.2, each choice one place on, or anew."""

    def neighbor(attempt: int) -> Values:
        generator = np.random.default_rng([sweep.seed, *key, attempt])

        def draw(path: str, dimension: DimensionSpec) -> Any:
            if path not in values or generator.random() < resample:
                return drawn(generator, dimension)
            return _moved(generator, dimension, values[path])

        return walk(sweep.dimensions(), draw)

    return kept(sweep, neighbor)


def _moved(generator: np.random.Generator, dimension: DimensionSpec, value: Any) -> Any:
    match dimension:
        case Choice(values=choices):
            place = choices.index(value) + int(generator.choice([-1, 1]))
            return choices[min(max(place, 0), len(choices) - 1)]
        case IntUniform(low=low, high=high):
            return int(min(max(round(value * generator.choice(CHANGES)), low), high))
        case Uniform(low=low, high=high) | LogUniform(low=low, high=high):
            return float(min(max(value * generator.choice(CHANGES), low), high))


def _estimated(sweep: SweepSpec, tpe: TPESearch, study: Any, index: int, attempt: int) -> Values:
    """Optuna's TPE over the study, by a seed of its own for each proposal."""
    import optuna

    seed = int(np.random.SeedSequence([sweep.seed, index, attempt]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=tpe.startup_trials, seed=seed)
    trial = study.ask()
    values = walk(sweep.dimensions(), lambda path, dimension: _suggested(trial, path, dimension))
    study.tell(trial, state=optuna.trial.TrialState.FAIL)  # estimates pass over it
    return values


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
