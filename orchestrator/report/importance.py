"""Trials in Optuna's words, and which searched fields the metric depends on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.records import finite
from orchestrator.report.run import Facts
from orchestrator.report.sweep_stats import Sweep, TrialRun

FEWEST_TRIALS = 20
"""Trials below which nothing is said. In a simulation with one field that mattered among four, and noise of
the size of its effect, fANOVA named it first in 8, 12, 14, 17 and 19 of 20 sweeps of 8, 16, 20, 30 and 50 trials."""

MOST_TRIALS = 300
"""Trials that the forest is grown from: its time grows faster than their number."""


def optuna_trial(
    dimensions: Mapping[str, Facts], values: Mapping[str, Any], reports: Sequence[tuple[int, float]]
) -> Any:
    """A finished trial: its last report counts; choices are known by their place.

    `dimensions`: searched field → `type`, and `low` and `high` or `values`.
    """
    import optuna

    return optuna.trial.create_trial(
        params={path: _value(dimensions[path], v) for path, v in values.items()},
        distributions={path: _distribution(dimensions[path]) for path in values},
        value=reports[-1][1],
        intermediate_values=dict(reports),
    )


def _value(dimension: Facts, value: Any) -> Any:
    return list(dimension["values"]).index(value) if dimension["type"] == "choice" else value


def _distribution(dimension: Facts) -> Any:
    import optuna.distributions as d

    match dimension["type"]:
        case "choice":
            return d.CategoricalDistribution(list(range(len(dimension["values"]))))
        case "int_uniform":
            return d.IntDistribution(dimension["low"], dimension["high"])
        case kind:
            return d.FloatDistribution(
                dimension["low"], dimension["high"], log=kind == "log_uniform"
            )


def importance(sweep: Sweep) -> tuple[dict[str, float], str]:
    """(field → share of the metric's variance, how it was found or why it was not).

    fANOVA (Hutter et al., ICML 2014) over trials after the same training: at the furthest rung that half of
    them, and FEWEST_TRIALS, reached. Further on only survivors are left, which are alike in the field that
    decided. Trials that went on from another's checkpoint do not count.
    """
    step, trials = _compared(sweep)
    if len(trials) < FEWEST_TRIALS:
        return {}, (
            f"Not computed: it takes {FEWEST_TRIALS} trials with a value at the same rung, "
            f"and there are {len(trials)}."
        )
    try:
        found = _fanova(sweep, trials)
    except (KeyError, RuntimeError, ValueError) as error:
        return {}, f"Could not be computed: {error}"
    if not found:
        return (
            {},
            "Not computed: no searched field differs between these trials, or the metric does not.",
        )
    used = len(trials[:: -(-len(trials) // MOST_TRIALS)])
    left_out = [path for path in sweep.dimensions() if path not in found]
    words = f"fANOVA over the values of {used} trials at step {step}."
    if step != (sweep.rungs or (step,))[-1]:
        words += " Fewer got further; what matters in the end may differ."
    if left_out:
        words += f" Left out, because not every trial has them: {', '.join(left_out)}."
    return found, words


def _compared(sweep: Sweep) -> tuple[int, list[tuple[TrialRun, float]]]:
    """(the base job's step of a rung, its trials with their values)."""
    at_rung = [(step, _values_at(sweep, number)) for number, step in enumerate(sweep.rungs)]
    first, all_of_them = at_rung[0] if at_rung else (0, [])
    enough = max(FEWEST_TRIALS, len(all_of_them) / 2)
    return next((r for r in reversed(at_rung) if len(r[1]) >= enough), (first, all_of_them))


def _values_at(sweep: Sweep, number: int) -> list[tuple[TrialRun, float]]:
    found = []
    for trial in sweep.trials:
        step = trial.rungs[number] if number < len(trial.rungs) else None
        if trial.state.parent is None and step in trial.state.reports:
            value = finite(sweep.log.value(trial.state, step))
            found += [(trial, value)] if value is not None else []
    return found


def _fanova(sweep: Sweep, trials: Sequence[tuple[TrialRun, float]]) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dimensions = sweep.dimensions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction=sweep.log.metric.direction)
        for trial, value in trials[:: -(-len(trials) // MOST_TRIALS)]:
            study.add_trial(optuna_trial(dimensions, trial.state.values, [(0, value)]))
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {path: share for path, value in found.items() if (share := finite(value)) is not None}
