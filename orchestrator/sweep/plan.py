"""What a sweep would run: slots, rungs, trials expected at each, compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.data.prepare import Prepared, Split
from orchestrator.errors import PlanError, SpecError
from orchestrator.plan import Cluster, Plan, make_plan
from orchestrator.plan.resources import Workers, share_out
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.sweep import (
    AshaScheduler,
    MedianScheduler,
    NoScheduler,
    PbtScheduler,
    SweepSpec,
)
from orchestrator.spec.sweep_rules import with_values
from orchestrator.sweep.space import Values, default_trials
from orchestrator.values import Frozen

TRIALS = "trials"
"""Folder of the trials' run folders, inside the sweep's."""


class SweepPlan(Frozen):
    """Everything that is derived before a sweep starts. `base`: the job as one trial's slot sees it."""

    spec: JobSpec
    cluster: Cluster
    base: Plan
    run_dir: str
    slots: int
    num_trials: int
    rungs: tuple[int, ...]
    """Steps of the base job at which trials are compared; the last one is its end."""
    expected: tuple[float, ...]
    """Trials expected to reach each rung."""
    expected_steps: int
    """Optimizer steps of all trials together, as expected."""
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()

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
    reasons: dict[str, str] = {}
    num_trials = default_trials(sweep)
    slots = _slots(spec, sweep, cluster, num_trials, reasons)
    work_dir = work_dir or Path.cwd()
    root = work_dir / spec.storage / spec.name
    one = parse_spec(with_values(spec, {}))
    with _fitting(slots):
        base = make_plan(one, cluster.divided(slots), prepared, work_dir)
    rungs = rungs_of(sweep, base, base.total_steps, reasons)
    expected = expected_at(sweep, num_trials, rungs, slots)
    return SweepPlan(
        spec=spec,
        cluster=cluster,
        base=base,
        run_dir=str(root),
        slots=slots,
        num_trials=num_trials,
        rungs=rungs,
        expected=expected,
        expected_steps=round(
            sum(n * (b - a) for n, a, b in zip(expected, (0, *rungs), rungs, strict=False))
        ),
        reasons=reasons,
        warnings=tuple(_warnings(sweep, num_trials, slots)),
    )


def slots_of(spec: JobSpec, cluster: Cluster) -> tuple[int, Workers]:
    """(slots, the workers of each): what can be started before there are rows to plan with.

    Raises PlanError where one trial does not fit a slot.
    """
    assert spec.sweep is not None
    slots = _slots(spec, spec.sweep, cluster, default_trials(spec.sweep), {})
    with _fitting(slots):
        return slots, share_out(spec, cluster.divided(slots), {})


@contextmanager
def _fitting(slots: int) -> Iterator[None]:
    """Says of what does not fit that a slot is what it has to fit."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"a trial does not fit one of {slots} slots: {error}") from error


def plan_trial(
    plan: SweepPlan, trial: str, values: Values, prepared: dict[Split, Prepared]
) -> Plan:
    """The plan of one trial.

    Raises SpecError or PlanError where its values do not go together.
    """
    storage = str(Path(plan.spec.storage) / plan.spec.name / TRIALS)
    data = with_values(plan.spec, {**values, "name": trial, "storage": storage})
    spec = parse_spec(data, trial)
    work_dir = Path(plan.base.work_dir)
    made = make_plan(spec, plan.cluster.divided(plan.slots), prepared, work_dir)
    if made.eval_data is None:
        raise SpecError([], trial)
    return made.model_copy(update={"rungs": rungs_of(plan.sweep, made, made.total_steps, {})})


def unit_per_step(sweep: SweepSpec, plan: Plan) -> float:
    """How much of the scheduler's unit one optimizer step of this plan is."""
    match getattr(sweep.scheduler, "unit", "steps"):
        case "rows":
            return plan.global_rows
        case "tokens":
            return plan.train_data.tokens / max(plan.train_data.rows, 1) * plan.global_rows
        case _:
            return 1.0


def rungs_of(
    sweep: SweepSpec, plan: Plan, total_steps: int, reasons: dict[str, str]
) -> tuple[int, ...]:
    """Steps at which a trial of this plan is compared, the last one its end."""
    per_step = unit_per_step(sweep, plan)
    match sweep.scheduler:
        case NoScheduler():
            return (total_steps,)
        case PbtScheduler(generations=count):
            return tuple(sorted({math.ceil(total_steps * (g + 1) / count) for g in range(count)}))
        case MedianScheduler():
            first = max(1, math.ceil(first_rung(sweep, plan) / per_step))
            reasons["rungs"] = "median stopping compares at every evaluation from the first rung on"
            return tuple(sorted({min(first, total_steps), total_steps}))
        case AshaScheduler(reduction_factor=factor):
            rung, out = first_rung(sweep, plan), []
            while math.ceil(rung / per_step) < total_steps:
                out.append(max(1, math.ceil(rung / per_step)))
                rung *= factor
            reasons["rungs"] = (
                f"each {factor} times as far as the one before; one in {factor} goes on"
            )
            return (*dict.fromkeys(out), total_steps)


def first_rung(sweep: SweepSpec, plan: Plan) -> float:
    """The first rung, in the scheduler's unit."""
    scheduler, per_step = sweep.scheduler, unit_per_step(sweep, plan)
    assert isinstance(scheduler, AshaScheduler | MedianScheduler)
    if scheduler.min != "auto":
        return scheduler.min
    factor = scheduler.reduction_factor if isinstance(scheduler, AshaScheduler) else 3
    return max(math.ceil(plan.total_steps / factor**2), 1) * per_step


def expected_at(
    sweep: SweepSpec, num_trials: int, rungs: tuple[int, ...], slots: int
) -> tuple[float, ...]:
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


def _slots(
    spec: JobSpec, sweep: SweepSpec, cluster: Cluster, num_trials: int, reasons: dict[str, str]
) -> int:
    if sweep.slots != "auto":
        return sweep.slots
    wanted, asked = spec.resources, spec.resources.num_workers
    workers = asked if isinstance(asked, int) else 1
    on_gpu = cluster.gpus > 0 and wanted.gpus_per_worker != 0
    if on_gpu:
        share = 1.0 if wanted.gpus_per_worker == "auto" else wanted.gpus_per_worker
        room = int(sum(n.gpus // share for n in cluster.nodes) // workers)
        what = f"{cluster.gpus:g} GPUs, {workers} × {share:g} GPU per trial"
    else:
        cpus = 1 if wanted.cpus_per_worker == "auto" else wanted.cpus_per_worker
        room = int(cluster.cpus // (workers * cpus))
        what = f"{cluster.cpus:g} CPUs, {workers} × {cpus} per trial"
    reasons["slots"] = what + (f"; no more than {num_trials} trials" if num_trials < room else "")
    return max(1, min(room, num_trials))


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
