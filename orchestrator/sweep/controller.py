"""Controller of a sweep: proposes trials, and logs every decision before it takes effect."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray

from orchestrator.errors import OrchestratorError
from orchestrator.plan.plan import Plan
from orchestrator.report.trial_log import SweepLog, TrialState
from orchestrator.run_folder import RunFolder, SweepFolder, write_atomically, write_json
from orchestrator.spec import dump_spec
from orchestrator.spec.search_space import Values
from orchestrator.spec.sweep import PbtScheduler
from orchestrator.sweep.decisions import SchedulerDecisions
from orchestrator.sweep.plan import SweepPlan, as_planned, unit_per_step
from orchestrator.sweep.pool import NO_END
from orchestrator.sweep.space import Past, perturbed, propose
from orchestrator.train.checkpoint import committed, retain

NO_MORE: Final = TrialState("", -1, {})
"""What `next_trial` returns when there will be no further trial."""
MOST_LOST = 10
"""Trial proxies that one trial may lose before the sweep is stopped."""
FAILURES = ("diverged", "failed")

MakePlan = Callable[[str, Values], Plan]


class SweepController:
    """One per sweep, in the driver. Called by Tune's loop; plans are made in a thread beside it."""

    def __init__(
        self,
        plan: SweepPlan,
        log: SweepLog,
        broker: Any,
        folder: SweepFolder,
        make_plan: MakePlan,
        spent_s: float = 0.0,
    ) -> None:
        """`spent_s`: of `budget.max_time_s`, by earlier launches and by the start of this one."""
        self.plan, self.log, self.broker, self.folder = plan, log, broker, folder
        self.make_plan = make_plan
        self.decisions = SchedulerDecisions(plan, log)
        self.past = Past(plan.sweep, log.metric)
        self.per_step: dict[str, float] = {}
        """What one step is in the scheduler's unit, by trial, until the trial ends."""
        self.stopping: str | None = None
        """Why the sweep ends early, once it does."""
        self.broken = False
        """Whether that is no end that anybody asked for."""
        self.started_at = time.monotonic() - spent_s
        self.live: set[str] = set()
        self._unassigned: list[str] = []
        self._lost: Counter[str] = Counter()
        self._with_checkpoints = set(log.trials)
        self._unfinished = [t for t in log.trials.values() if t.status is None]
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def begin(self, count: int) -> None:
        """Queue the first trials before Tune is there: it follows them when it asks for its own first ones."""
        drawn = (self.next_trial() for _ in range(count))
        self._unassigned = [t.id for t in drawn if t is not None and t is not NO_MORE]

    def next_trial(self) -> TrialState | None:
        """The next trial to run or to follow on; None where one may come later, NO_MORE where none will."""
        if self._unassigned:
            return self.log.trials[self._unassigned.pop(0)]
        self.check_budget()
        if self._unfinished and not self.stopping:
            return self._start(self._unfinished.pop(0))
        proposed = NO_MORE if self.stopping else self._propose()
        if proposed is NO_MORE and self.live:
            return None  # a trial proxy may be lost yet
        if proposed is None or proposed is NO_MORE:
            return proposed
        self.log.trial(proposed.id, proposed.index, proposed.values, proposed.parent)
        trial = self.log.trials[proposed.id]
        self.decisions.proposed(trial)
        return self._start(trial)

    def reported(self, said: dict[str, Any]) -> None:
        """Judge a report, log it, answer; one that comes twice has its answer already."""
        trial, step = self.log.trials[said["trial"]], said["step"]
        decision = trial.decisions.get(step)
        if decision is None:
            value = said["metrics"].get(self.log.metric.name, math.nan)
            # Rounded: a rung is a whole number, and step × rows may fall short of it by a float's last bit.
            key = float(round(step * self.per_step[trial.id]))
            decision = self.decisions.decide(trial, step, key, value, said["last"])
            self.log.report(trial.id, step, key, said["metrics"], decision)
        self.broker.decision.remote(trial.id, step, decision.go_on, decision.save)
        self.check_budget()

    def ended(self, said: dict[str, Any]) -> None:
        """Log an end. A trial that was asked to stop stays open: a resumed sweep goes on with it.

        So does one that could not write: the others could not either, so the sweep stops.
        """
        self.live.discard(said["trial"])
        if said["status"] == "storage_failed":
            self.folder.reserve.unlink(missing_ok=True)
            self.stop(f"{said['trial']}: {said['message']}", broken=True)
        if said["status"] in NO_END:
            return
        self.log.end(said["trial"], said["status"], said["step"], said["message"])
        self.per_step.pop(said["trial"], None)
        self.decisions.ended(self.log.trials[said["trial"]])
        self._forget_checkpoints()

    def proxy_lost(self, trial: str) -> None:
        """Tune lost the trial proxy's process: another one will take what this trial reports."""
        self._lost[trial] += 1
        if self._lost[trial] <= MOST_LOST:
            self._unassigned.append(trial)
            return
        self.stop(f"the process that follows {trial} could not be kept", broken=True)
        self.broker.give_up.remote(trial)
        self.live.discard(trial)

    def stop(self, why: str, broken: bool = False) -> None:
        """Ask every running trial to commit a checkpoint and leave; propose no more."""
        if self.stopping is None:
            self.stopping, self.broken = why, broken
        self.broker.cancel.remote()
        for trial in list(self.live):  # a signal may come while Tune adds one
            folder = self.folder.trial(trial)
            if folder.root.exists():
                folder.stop_request.touch()

    def close(self) -> None:
        """Wait for plans in the making."""
        self._planner.shutdown(wait=True, cancel_futures=True)

    # proposals

    def _propose(self) -> TrialState | None:
        index = len(self.log.trials)
        if isinstance(self.plan.sweep.scheduler, PbtScheduler):
            return self._next_of_population(self.plan.sweep.scheduler, index)
        if index >= self.plan.num_trials:
            return NO_MORE
        self.past.follow(self.log)
        values = propose(self.plan.sweep, index, self.past)
        return NO_MORE if values is None else TrialState(f"t{index:05d}", index, values)

    def _next_of_population(self, pbt: PbtScheduler, index: int) -> TrialState | None:
        """Member m of generation g. A generation begins when the one before has ended."""
        generation, member = divmod(index, self.plan.num_trials)
        if generation >= len(self.plan.rungs):
            return NO_MORE
        if generation == 0:
            values = propose(self.plan.sweep, index, self.past)
            return None if values is None else TrialState(f"m{member:03d}g00", index, values)
        begin, end = index - member - self.plan.num_trials, index - member
        before = list(islice(self.log.trials.values(), begin, end))
        if any(t.status is None for t in before):
            return None
        alive = [t for t in before if t.status not in FAILURES and t.best is not None]
        if not alive:
            self.stopping = "no member of the population is left"
            return NO_MORE
        going = sorted(
            (t for t in alive if t.status != "finished"),  # those ended early, by a rule of the job
            key=lambda t: -self.log.metric.score(self.log.value(t, t.step)),
        )
        if not going:
            return NO_MORE
        parent, values = self._heir(pbt, before[member], going, generation, member)
        return TrialState(
            f"m{member:03d}g{generation:02d}", index, values, (parent.id, parent.step)
        )

    def _heir(
        self,
        pbt: PbtScheduler,
        mine: TrialState,
        alive: list[TrialState],
        generation: int,
        member: int,
    ) -> tuple[TrialState, Values]:
        """Whose checkpoint a member goes on from, and with which values: its own, or a winner's, changed."""
        count = max(1, int(len(alive) * pbt.quantile))
        losers = {t.id for t in alive[len(alive) - count :]} if len(alive) > count else set()
        if mine in alive and mine.id not in losers:
            return mine, mine.values
        draw = np.random.default_rng([self.plan.sweep.seed, generation, member, 7])
        donor = alive[int(draw.integers(count))]
        values = perturbed(
            self.plan.sweep, donor.values, pbt.resample_probability, generation, member
        )
        return donor, values

    # starting

    def _start(self, trial: TrialState) -> TrialState:
        self.live.add(trial.id)
        self._with_checkpoints.add(trial.id)
        self._planner.submit(self._prepare, trial)
        return trial

    def _prepare(self, trial: TrialState) -> None:
        """Plan a trial, lay out its folder, hand it to the slots; what cannot be planned has failed."""
        try:
            plan = self.make_plan(trial.id, trial.values)
            folder = RunFolder(Path(plan.run_dir))
            folder.root.mkdir(parents=True, exist_ok=True)
            folder.stop_request.unlink(missing_ok=True)
            write_atomically(folder.spec, dump_spec(as_planned(plan)))
            write_json(folder.plan, plan.model_dump(mode="json"))
            if trial.parent is not None:
                self._inherit(folder, trial.parent)
            self.per_step[trial.id] = unit_per_step(self.plan.sweep, plan)
        except OrchestratorError as error:
            self.broker.fail.remote(trial.id, str(error))
            return
        except Exception as error:  # noqa: BLE001, one trial's trouble must not end the sweep
            self.broker.fail.remote(trial.id, f"{type(error).__name__}: {error}")
            return
        # Waited for: Ray may run calls to an async actor in another order than they were made in.
        ray.get(self.broker.enqueue.remote(trial.id, plan.model_dump_json(), plan.num_workers))

    def _inherit(self, folder: RunFolder, parent: tuple[str, int]) -> None:
        """Give a trial its parent's checkpoint: the same files, linked where the file system can."""
        if committed(folder.checkpoints):
            return
        name, step = parent
        found = [c for c in committed(self.folder.trial(name).checkpoints) if c.step == step]
        if not found:
            raise OrchestratorError(f"{name} has no checkpoint of step {step} to go on from")
        temporary = folder.checkpoints / f".inherited-{found[0].folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(found[0].folder, temporary, copy_function=_link)
        temporary.rename(folder.checkpoints / found[0].folder.name)

    # endings

    def check_budget(self) -> None:
        """Stop the sweep where its budget is used up."""
        budget = self.plan.sweep.budget
        spent = time.monotonic() - self.started_at
        if self.stopping:
            return
        if budget.max_time_s is not None and spent >= budget.max_time_s:
            self.stop(f"sweep.budget.max_time_s = {budget.max_time_s:g} is used up")
        elif budget.max_steps_total is not None and self.log.steps_total >= budget.max_steps_total:
            self.stop(f"sweep.budget.max_steps_total = {budget.max_steps_total:,} are used up")
        elif budget.patience_trials is not None and self.log.best() is not None:
            stale = self.log.ended_since_best
            if stale >= budget.patience_trials:
                self.stop(f"the best has not improved for {stale} trials")

    def _forget_checkpoints(self) -> None:
        """Delete checkpoints of ended trials that are not among the best."""
        ranked = self.log.ranked([self.log.trials[t] for t in self._with_checkpoints])
        kept = {t.id for t in ranked[: self.plan.sweep.keep_trials]}
        if isinstance(self.plan.sweep.scheduler, PbtScheduler):  # the next generation's parents
            kept |= set(islice(reversed(self.log.trials), 2 * self.plan.num_trials))
        for trial in [t for t in self._with_checkpoints if t not in kept]:
            if self.log.trials[trial].status is not None:
                folder = self.folder.trial(trial).checkpoints
                retain(folder, 0, None)
                shutil.rmtree(folder, ignore_errors=True)
                self._with_checkpoints.discard(trial)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
