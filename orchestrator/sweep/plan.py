"""What a sweep would run: slots, rungs, trials expected at each, compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

from orchestrator.data.prepare import Prepared, Split
from orchestrator.errors import PlanError, SpecError
from orchestrator.plan import Cluster, Plan, make_plan
from orchestrator.plan.slots import fitting, slots_of
from orchestrator.renames import PLAN_FORMAT
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.search_space import Values, default_trials
from orchestrator.spec.sweep import (
    AshaScheduler,
    Choice,
    MedianScheduler,
    NoScheduler,
    PbtScheduler,
    SweepSpec,
)
from orchestrator.spec.sweep_rules import with_values
from orchestrator.values import Frozen

TRIALS = "trials"
"""Folder of the trials' run folders, inside the sweep's."""


class SweepPlan(Frozen):
    """Everything that is derived before a sweep starts. `base`: the job as one trial's slot sees it."""

    format_version: Literal[2] = PLAN_FORMAT
    spec: JobSpec
    cluster: Cluster
    base: Plan
    run_dir: str
    slots: int
    num_trials: int
    rungs: tuple[int, ...]
    """Steps of the base job at which trials are compared; the last one is its end."""
    milestones: tuple[float, ...]
    """The same but for the last one, in the scheduler's unit."""
    expected: tuple[float, ...]
    """Trials expected to reach each rung."""
    expected_steps: int
    """Optimizer steps of all trials together, as expected."""
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def planned_trials(self) -> int:
        """Trials there will be; in population-based training each generation of a member is one."""
        generations = len(self.rungs) if isinstance(self.sweep.scheduler, PbtScheduler) else 1
        return self.num_trials * generations

    @property
    def sweep(self) -> SweepSpec:
        """The sweep section, which a job that got here has."""
        assert self.spec.sweep is not None
        return self.spec.sweep


def plan_sweep(
    spec: JobSpec, cluster: Cluster, prepared: dict[Split, Prepared], work_dir: Path | None = None
) -> SweepPlan:
    """Derive the sweep's numbers, each with its reason.

    Raises SpecError for a job without a sweep section, PlanError where one trial does not fit a slot.
    """
    sweep = spec.sweep
    if sweep is None:
        raise PlanError(f"{spec.name}: no `sweep:` section. `orchestrator train` runs single jobs.")
    slots, num_trials = slots_of(spec, cluster), default_trials(sweep)
    reasons = {"slots": slots.reason}
    work_dir = work_dir or Path.cwd()
    root = work_dir / spec.storage_path / spec.name
    one = parse_spec(with_values(spec, {}))
    with fitting(slots.count):
        base = make_plan(one, slots.share, prepared, work_dir)
    rungs = rungs_of(sweep, base, base, reasons)
    expected = expected_at(sweep, num_trials, rungs)
    return SweepPlan(
        spec=spec,
        cluster=cluster,
        base=base,
        run_dir=str(root),
        slots=slots.count,
        num_trials=num_trials,
        rungs=rungs,
        milestones=_milestones(sweep, base, base),
        expected=expected,
        expected_steps=round(
            sum(n * (b - a) for n, a, b in zip(expected, (0, *rungs), rungs, strict=False))
        ),
        reasons=reasons,
        warnings=(
            *_warnings(sweep, num_trials, slots.count),
            *_rung_warnings(sweep, base, rungs[0]),
        ),
    )


def plan_trial(
    plan: SweepPlan, trial: str, values: Values, prepared: dict[Split, Prepared]
) -> Plan:
    """The plan of one trial.

    Raises SpecError or PlanError where its values do not go together.
    """
    storage = str(Path(plan.spec.storage_path) / plan.spec.name / TRIALS)
    data = with_values(plan.spec, {**values, "name": trial, "storage_path": storage})
    spec = parse_spec(data, trial)
    work_dir = Path(plan.base.work_dir)
    made = make_plan(spec, plan.base.cluster, prepared, work_dir)
    if made.eval_data is None:
        raise SpecError([], trial)
    return made.model_copy(update={"rungs": rungs_of(plan.sweep, plan.base, made, {})})


def as_planned(plan: Plan) -> JobSpec:
    """A trial's job with what its slot decided written out: it gives the same anywhere, to the bit."""
    spec, auto = plan.spec, plan.workers
    resources = {
        "num_workers": auto.count,
        "gpus_per_worker": auto.gpus,
        "cpus_per_worker": auto.cpus,
    }
    return spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update=resources),
            "batch": spec.batch.model_copy(update={"micro_batch_size": plan.micro_batch_size}),
            "zero": spec.zero.model_copy(update={"stage": plan.stage}),
        }
    )


def unit_per_step(sweep: SweepSpec, plan: Plan) -> float:
    """How much of the scheduler's unit one optimizer step of this plan is."""
    match getattr(sweep.scheduler, "unit", "steps"):
        case "rows":
            return plan.global_batch_size
        case "tokens":
            return plan.train_data.tokens / max(plan.train_data.rows, 1) * plan.global_batch_size
        case _:
            return 1.0


def rungs_of(sweep: SweepSpec, base: Plan, plan: Plan, reasons: dict[str, str]) -> tuple[int, ...]:
    """Steps at which a trial of this plan is compared, the last one its end.

    The rungs are those of `base`, in the scheduler's unit: trials of other lengths meet at the same ones.
    """
    match sweep.scheduler:
        case MedianScheduler():
            reasons["rungs"] = "median stopping compares at every evaluation from the first rung on"
        case AshaScheduler(reduction_factor=factor):
            reasons["rungs"] = (
                f"each {factor} times as far as the one before; one in {factor} goes on"
            )
    per_step = unit_per_step(sweep, plan)
    steps = [max(1, math.ceil(rung / per_step)) for rung in _milestones(sweep, base, plan)]
    return (*dict.fromkeys(s for s in steps if s < plan.total_steps), plan.total_steps)


def _milestones(sweep: SweepSpec, base: Plan, plan: Plan) -> tuple[float, ...]:
    """How far a trial of `plan` has come, in the scheduler's unit, when it is compared before its end."""
    end = plan.total_steps * unit_per_step(sweep, plan)
    match sweep.scheduler:
        case NoScheduler():
            return ()
        case PbtScheduler(generations=parts):
            return tuple(math.ceil(end * g / parts) for g in range(1, parts))
        case MedianScheduler():
            return (first_rung(sweep, base),)
        case AshaScheduler(reduction_factor=factor):
            first = first_rung(sweep, base)
            return tuple(takewhile(lambda rung: rung < end, (first * factor**k for k in count())))


def first_rung(sweep: SweepSpec, base: Plan) -> int:
    """The first rung, in the scheduler's unit; whole, so that multiples of it are exact."""
    scheduler, per_step = sweep.scheduler, unit_per_step(sweep, base)
    assert isinstance(scheduler, AshaScheduler | MedianScheduler)
    if scheduler.grace_period != "auto":
        return scheduler.grace_period
    factor = scheduler.reduction_factor if isinstance(scheduler, AshaScheduler) else 3
    return max(1, math.floor(max(math.ceil(base.total_steps / factor**2), 1) * per_step))


def expected_at(sweep: SweepSpec, num_trials: int, rungs: tuple[int, ...]) -> tuple[float, ...]:
    """Trials expected to train up to each rung.

    Under ASHA the first to arrive at a rung always goes on, and of k arrivals about k/factor do.
    """
    reach: list[float] = []
    here = float(num_trials)
    for _ in rungs:
        reach.append(here)
        match sweep.scheduler:
            case AshaScheduler(reduction_factor=factor):
                here = max(1.0, here / factor)
            case MedianScheduler(min_trials=least):
                here = min(here, least + (here - least) / 2)
            case _:
                pass
    return tuple(round(n, 1) for n in reach)


def _warnings(sweep: SweepSpec, num_trials: int, slots: int) -> list[str]:
    out = []
    scheduler = sweep.scheduler
    if isinstance(scheduler, AshaScheduler):
        factor = scheduler.reduction_factor
        if num_trials < 3 * factor:
            out.append(
                f"ASHA compares a trial with those that came before it: with {num_trials} trials and "
                f"reduction_factor {factor} little is pruned"
            )
    if isinstance(scheduler, PbtScheduler) and num_trials % slots:
        out.append(
            f"{num_trials} trials per generation on {slots} slots: the last round leaves some idle"
        )
    return out


def _rung_warnings(sweep: SweepSpec, base: Plan, first: int) -> Iterator[str]:
    """Trials that are compared before each of them trains at its own rate."""
    longest = max(
        base.warmup_steps,
        math.ceil(_largest(sweep, "schedule.warmup_ratio") * base.total_steps),
        _largest(sweep, "schedule.warmup_steps"),
    )
    if isinstance(sweep.scheduler, AshaScheduler | MedianScheduler) and first < longest:
        yield (
            f"trials are first compared at step {first:,}, and warm-up may last until step {longest:,}: what is "
            "pruned may be what had not begun. Raise sweep.scheduler.grace_period, or shorten warm-up"
        )


def _largest(sweep: SweepSpec, path: str) -> float:
    """The largest value that is searched for a field; 0 where it is not searched."""
    match sweep.dimensions().get(path):
        case None:
            return 0
        case Choice(values=values):
            return max((v for v in values if isinstance(v, int | float)), default=0)
        case dimension:
            return dimension.high
