"""Rules of a sweep: its space must name fields of the job and values they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.effects import NOT_SEARCHED, Effect, changes_between, effect_of, fields_of
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.spec.expression import Expression, ExpressionError
from orchestrator.spec.search_space import Values, grid, random_values
from orchestrator.spec.sweep import (
    Choice,
    Dimension,
    GridSearch,
    PbtScheduler,
    SweepSpec,
)

if TYPE_CHECKING:
    from orchestrator.spec.job import JobSpec

NOT_INHERITED = Effect.CHECKPOINT | Effect.ROUNDING | Effect.LENGTH
"""A trial of a population cannot go on with another value of such a field from another one's checkpoint."""
POINTS_TRIED = 20
"""Points of the space that are read as jobs; `check` says where none of them is one."""


def sweep_rules(spec: JobSpec) -> Iterator[Problem]:
    """Every rule that the sweep section breaks; none where there is no such section."""
    sweep = spec.sweep
    if sweep is None:
        return
    if spec.data.eval is None and spec.data.eval_fraction is None:
        yield Problem(
            "sweep", "compares trials on held-out rows, and there are none", "set data.eval"
        )
    dimensions = sweep.dimensions()
    for path, dimension in dimensions.items():
        yield from _dimension(spec, path, dimension, dimensions)
    yield from _searcher(spec, sweep, dimensions)
    for number, text in enumerate(sweep.constraints):
        yield from _constraint(number, text, dimensions)
    yield from _points(spec, sweep)


def with_values(spec: JobSpec, values: dict[str, Any]) -> dict[str, Any]:
    """The job's mapping with fields set by dotted path, and without its sweep section."""
    data = spec.model_dump(mode="json", exclude_unset=True)
    data.pop("sweep", None)
    for path, value in sorted(
        values.items(), key=lambda item: item[0].count(".")
    ):  # sections first
        here = data
        *parents, last = path.split(".")
        for part in parents:
            here[part] = dict(here.get(part) or {})
            here = here[part]
        here[last] = value
    return data


def _dimension(
    spec: JobSpec, path: str, dimension: Dimension, all_of_them: dict[str, Any]
) -> Iterator[Problem]:
    field = f"sweep.space.{path}"
    if path in fields_of(type(spec)) and not effect_of(type(spec), path) & ~NOT_SEARCHED:
        yield Problem(
            field, "belongs to the run, not to the model: it cannot be searched", "drop it"
        )
        return
    if _asks_teacher_again(spec, path):
        yield Problem(
            field, "the teacher would have to be asked again for each value, while the trials hold the machines",
            "one sweep per value; distillation.alpha and hidden.weight can be searched",
        )  # fmt: skip
        return
    if not isinstance(dimension, Choice) and dimension.low >= dimension.high:  # type: ignore[attr-defined]
        yield Problem(f"{field}.low", "must be below `high`", "swap them", dimension.low)  # type: ignore[attr-defined]
        return
    unknown = [other for other in dimension.when if other not in all_of_them or other == path]
    if unknown:
        yield Problem(
            f"{field}.when", f"{unknown[0]!r} is not another searched field",
            f"choose from: {', '.join(p for p in all_of_them if p != path)}",
        )  # fmt: skip
        return
    for value in ends(dimension):
        why = _refused(spec, {**dimension.when, path: value})
        if why:
            fix = ""
            if path.endswith(".type"):
                section = path.removesuffix(".type")
                fix = f"search the section whole: {section}: [{{type: …}}, {{type: …, and its fields}}]"
            yield Problem(field, f"the job refuses {value!r}: {why}", fix, None)
            return


def _asks_teacher_again(spec: JobSpec, path: str) -> bool:
    """Tell whether another value of the field changes what a teacher is asked, or what is kept of its answer."""
    free = {"distillation.alpha", "distillation.hidden.weight"}
    if spec.task.soft_targets != "tokens":
        free.add("distillation.temperature")
    section = path.split(".")[0]
    held_out = ("seed",) if spec.data.eval_fraction is not None else ()
    return (
        spec.distillation is not None
        and section in ("data", "task", "distillation", *held_out)
        and path not in free
    )


def ends(dimension: Dimension) -> tuple[Any, ...]:
    """The values that bound a dimension: its choices, or its two ends."""
    if isinstance(dimension, Choice):
        return dimension.values
    return (dimension.low, dimension.high)  # type: ignore[attr-defined]


def _refused(spec: JobSpec, values: dict[str, Any]) -> str | None:
    """Why the job cannot have these values, or None. Rules across fields are left to the trial."""
    data = with_values(spec, values)
    try:
        type(spec).model_validate(data)
    except ValidationError as error:
        from orchestrator.spec.validation_errors import problems_from

        problem = problems_from(error, data)[0]
        return f"{problem.why}" + (f" ({problem.fix})" if problem.fix else "")
    return None


def _searcher(spec: JobSpec, sweep: SweepSpec, dimensions: dict[str, Any]) -> Iterator[Problem]:
    if isinstance(sweep.searcher, GridSearch):
        for path, dimension in dimensions.items():
            if not isinstance(dimension, Choice):
                yield Problem(
                    f"sweep.space.{path}", "a grid needs a list of values", "list them, or searcher: {type: random}"
                )  # fmt: skip
    if isinstance(sweep.scheduler, PbtScheduler):
        if isinstance(sweep.searcher, GridSearch):
            yield Problem("sweep.searcher", "PBT draws its population at random", "drop it", "grid")
        if sweep.num_trials is not None and sweep.num_trials < 4:
            yield Problem(
                "sweep.num_trials", "PBT needs a population of 4 or more", "4", sweep.num_trials
            )
        for path, dimension in dimensions.items():
            if changes_between(type(spec), path, ends(dimension)) & NOT_INHERITED:
                yield Problem(
                    f"sweep.space.{path}", "a checkpoint cannot be taken over into another value of it",
                    "under PBT search numbers of optimizer, schedule and regularization",
                )  # fmt: skip


def _constraint(number: int, text: str, dimensions: dict[str, Any]) -> Iterator[Problem]:
    field = f"sweep.constraints.{number}"
    try:
        names = Expression(text).names
    except ExpressionError as error:
        yield Problem(field, str(error), "as in optimizer.lr * batch.global_batch_size < 0.1", text)
        return
    for name in sorted(names - dimensions.keys()):
        yield Problem(
            field, f"{name!r} is not searched", f"choose from: {', '.join(dimensions)}", text
        )


def _points(spec: JobSpec, sweep: SweepSpec) -> Iterator[Problem]:
    """Yield a problem if no trial can run: some point must keep the constraints and be a valid job.

    Silent where a field or a constraint is wrong by itself: that has been said.
    """
    try:
        points = list(_some_points(sweep))
    except (ExpressionError, ValueError):
        return
    except OrchestratorError as error:
        _, _, why = str(error).partition(": ")
        yield Problem("sweep.constraints", why, "")
        return
    if not points:
        yield Problem("sweep.constraints", "no point of the grid keeps them", "drop one")
    own = _broken(spec, {}) or []
    whys = [
        [problem for problem in found if problem not in own]
        for values in points
        if (found := _broken(spec, values)) is not None
    ]
    if whys and all(whys):
        values = ", ".join(f"{path}={value!r}" for path, value in points[0].items())
        yield Problem(
            "sweep.space", f"no trial could run: {whys[0][0]}, with {values}, and so on in {len(whys)} points tried",
            "change the space, or the job's own fields",
        )  # fmt: skip


def _some_points(sweep: SweepSpec) -> Iterator[Values]:
    """The first points of a grid, or the first draws."""
    if isinstance(sweep.searcher, GridSearch):
        yield from itertools.islice(grid(sweep), POINTS_TRIED)
    else:
        yield from (random_values(sweep, index) for index in range(POINTS_TRIED))


def _broken(spec: JobSpec, values: Values) -> list[Problem] | None:
    """The rules across fields that the job breaks with these values; None where a field refuses one itself."""
    from orchestrator.spec.rules import broken_rules

    try:
        return broken_rules(type(spec).model_validate(with_values(spec, values)), "there")
    except ValidationError:
        return None
