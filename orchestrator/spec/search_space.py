"""Points of a sweep's space: grids, draws, conditions and constraints."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import OrchestratorError
from orchestrator.spec.expression import Expression
from orchestrator.spec.sweep import (
    Choice,
    DimensionSpec,
    GridSearch,
    IntUniform,
    LogUniform,
    SweepSpec,
    Uniform,
)

if TYPE_CHECKING:
    import numpy as np

Values = dict[str, Any]
"""Dotted path → value."""
MOST_DRAWS = 1000
"""Draws that may break the constraints before the space is taken for empty."""


class Draw(Protocol):
    """One random value of a dimension."""

    def __call__(self, path: str, dimension: DimensionSpec) -> Any: ...


def default_trials(sweep: SweepSpec) -> int:
    """Trials to run where the job does not say."""
    if sweep.num_trials is not None:
        return sweep.num_trials
    return sum(1 for _ in grid(sweep)) if isinstance(sweep.searcher, GridSearch) else 20


def grid(sweep: SweepSpec) -> Iterator[Values]:
    """Every combination that keeps the constraints, the last field fastest, none twice."""
    dimensions = sweep.dimensions()
    choices = [d.values for d in dimensions.values() if isinstance(d, Choice)]
    given: set[str] = set()
    for combination in itertools.product(*choices):
        by_path = dict(zip(dimensions, combination, strict=True))
        values = walk(dimensions, lambda path, _, row=by_path: row[path])  # type: ignore[misc]
        key = json.dumps(values, sort_keys=True, default=str)
        if key not in given and keeps(sweep, values):
            given.add(key)
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
    """Tell whether the values keep every constraint."""
    return all(Expression(text).holds(values) for text in sweep.constraints)


def kept(sweep: SweepSpec, draw: Callable[[int], Values]) -> Values:
    """The first of `draw(0)`, `draw(1)`, … that keeps the constraints.

    Raises OrchestratorError where none of MOST_DRAWS does.
    """
    for attempt in range(MOST_DRAWS):
        values = draw(attempt)
        if keeps(sweep, values):
            return values
    raise OrchestratorError(
        f"sweep.constraints: none of {MOST_DRAWS} draws keeps {list(sweep.constraints)}. "
        "Widen the space or drop a constraint."
    )


def random_values(sweep: SweepSpec, index: int) -> Values:
    """Independent draws, by `sweep.seed` and `index` alone. Raises as `kept` does."""
    import numpy as np

    def draw(attempt: int) -> Values:
        generator = np.random.default_rng([sweep.seed, index, attempt])
        return walk(sweep.dimensions(), lambda _, dimension: drawn(generator, dimension))

    return kept(sweep, draw)


def drawn(generator: np.random.Generator, dimension: DimensionSpec) -> Any:
    """A random value of one dimension."""
    match dimension:
        case Choice(values=choices):
            return choices[int(generator.integers(len(choices)))]
        case IntUniform(low=low, high=high):
            return int(generator.integers(low, high + 1))
        case Uniform(low=low, high=high):
            return float(generator.uniform(low, high))
        case LogUniform(low=low, high=high):
            return float(math.exp(generator.uniform(math.log(low), math.log(high))))
