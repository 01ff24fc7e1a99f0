"""The scheduler's decisions, from the log's reports alone, so that a resumed sweep makes the same ones."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean, median

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from orchestrator.metric import Metric
from orchestrator.report.trial_log import Decision, SweepLog, TrialState
from orchestrator.spec.sweep import AshaScheduler, MedianScheduler, NoScheduler, PbtScheduler
from orchestrator.sweep.plan import SweepPlan, first_rung


@dataclass(frozen=True)
class _Named:
    """What Tune's ASHA needs of a trial: its id, the same before and after a resume."""

    trial_id: str


@dataclass
class _Means:
    """At one rung: each trial's mean until there, and how much of the log's order it was taken from."""

    by_trial: dict[str, float] = field(default_factory=dict)
    read: int = 0


class SchedulerDecisions:
    """Judges reports. ASHA's rungs are refilled from the log; Tune itself forgets them on a restore."""

    def __init__(self, plan: SweepPlan, log: SweepLog) -> None:
        self.plan, self.log = plan, log
        self.asha = _asha(plan, log.metric)
        self._means_at: defaultdict[float, _Means] = defaultdict(_Means)
        for kind, trial, step in log.order:
            self._replay(kind, log.trials[trial], step)

    def decide(
        self, trial: TrialState, step: int, key: float, value: float, last: bool
    ) -> Decision:
        """What becomes of a trial that reports `value` at `step`; `last`: it has no step after it."""
        save = self.log.is_among_best(value, trial, self.plan.sweep.keep_trials)
        match self.plan.sweep.scheduler:
            case AshaScheduler():
                return Decision(self._asha_goes_on(trial, key, value) or last, save)
            case MedianScheduler():
                return Decision(last or self._above_median(trial, key, value), save)
            case PbtScheduler():
                return Decision(last or step not in self.plan.rungs, True)
            case NoScheduler():
                return Decision(True, save)

    def proposed(self, trial: TrialState) -> None:
        """A trial was added."""
        self._replay("trial", trial, 0)

    def ended(self, trial: TrialState) -> None:
        """A trial is over."""
        self._replay("end", trial, trial.step)

    def _replay(self, kind: str, trial: TrialState, step: int) -> None:
        if self.asha is None:
            return
        named = _Named(trial.id)
        match kind:
            case "trial":
                self.asha.on_trial_add(None, named)  # type: ignore[arg-type]
            case "report":
                self._asha_goes_on(trial, trial.keys[step], self.log.value(trial, step))
            case "end":
                self.asha.on_trial_remove(None, named)  # type: ignore[arg-type]

    def _asha_goes_on(self, trial: TrialState, key: float, value: float) -> bool:
        assert self.asha is not None
        if not math.isfinite(value):  # NaN < cutoff is False: ASHA would let it live
            return False
        result = {"key": key, "value": value}
        action = self.asha.on_trial_result(None, _Named(trial.id), result)  # type: ignore[arg-type]
        return action != TrialScheduler.STOP

    def _above_median(self, trial: TrialState, key: float, value: float) -> bool:
        """Vizier's rule: the trial's best so far against the median of the others' running means."""
        scheduler = self.plan.sweep.scheduler
        assert isinstance(scheduler, MedianScheduler)
        if key < first_rung(self.plan.sweep, self.plan.base):
            return True
        means = self._means(key, but=trial)
        if len(means) < scheduler.min_trials:
            return True
        mine = [self.log.value(trial, s) for s in trial.reports] + [value]
        score = self.log.metric.score
        return max(map(score, mine)) >= score(median(means))

    def _means(self, key: float, but: TrialState) -> list[float]:
        """Of each other trial that has got as far as `key`: the mean of what it had reported until there.

        Such a mean stays what it is, so it is computed once.
        """
        means = self._means_at[key]
        for kind, name, step in self.log.order[means.read :]:
            trial = self.log.trials[name]
            if kind == "report" and name not in means.by_trial and trial.keys[step] >= key:
                upto = [self.log.value(trial, s) for s, k in trial.keys.items() if k <= key]
                finite = [value for value in upto if math.isfinite(value)]
                means.by_trial[name] = fmean(finite) if finite else math.nan
        means.read = len(self.log.order)
        return [m for name, m in means.by_trial.items() if name != but.id and math.isfinite(m)]


def _asha(plan: SweepPlan, metric: Metric) -> AsyncHyperBandScheduler | None:
    scheduler = plan.sweep.scheduler
    if not isinstance(scheduler, AshaScheduler):
        return None
    first = first_rung(plan.sweep, plan.base)
    return AsyncHyperBandScheduler(
        time_attr="key",
        metric="value",
        mode=metric.mode,
        max_t=10**18,  # a trial ends by its own plan
        grace_period=first,  # type: ignore[arg-type]
        reduction_factor=scheduler.reduction_factor,
    )
