"""A sweep from job to best model: prepare, plan, claim, fleet, Tune, export."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.data.prepare import Prepared, Split, find_prepared, prepare
from orchestrator.errors import TrainingError
from orchestrator.launch.claim import MAY_CHANGE, another_job, claimed_folder, differences
from orchestrator.launch.run import (
    cluster_here,
    must_have_secrets,
    prepared_data,
    stop_on_signals,
)
from orchestrator.launch.session import ray_session, send_chatter_to
from orchestrator.plan import Cluster, Plan, this_machine
from orchestrator.plan.resources import Workers
from orchestrator.report.records import append_event
from orchestrator.report.sweep_html import write_sweep_report
from orchestrator.report.sweep_view import SweepView
from orchestrator.report.trial_log import SweepLog, TrialState
from orchestrator.run_folder import SweepFolder, read_json, write_atomically, write_json
from orchestrator.spec import JobSpec, dump_spec, parse_spec
from orchestrator.spec.sweep_rules import with_values
from orchestrator.sweep.plan import SweepPlan, plan_sweep, plan_trial, slots_of
from orchestrator.sweep.space import Values

if TYPE_CHECKING:
    from orchestrator.sweep.director import Director
    from orchestrator.sweep.fleet import Fleet

POLL_S = 0.2
LEAVE_S = 60.0
"""How long slots may take to leave when there is nothing left to do."""
MAY_CHANGE_IN_SWEEP = (
    *MAY_CHANGE, "sweep.num_trials", "sweep.slots", "sweep.budget", "sweep.keep_trials",
    "sweep.max_trial_failures",
)  # fmt: skip


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left behind. `status`: `finished`, `budget` or `stopped`."""

    folder: SweepFolder
    plan: SweepPlan
    status: str
    message: str
    best: TrialState | None
    trials: int
    export: Path | None
    report: Path


def make_sweep_plan(spec: JobSpec, cluster: Cluster | None = None) -> SweepPlan:
    """The plan of a sweep, its data prepared first where it is not. Raises what plan_sweep raises."""
    prepared = find_prepared(spec)
    if prepared is None:
        with ray_session(this_machine().cpus):
            prepared = prepare(spec)
    return plan_sweep(spec, cluster or this_machine(), prepared)


def sweep(spec: JobSpec, fresh: bool = False, console: Console | None = None) -> SweepOutcome:
    """Run a sweep to its end, or on from where it stopped.

    Raises what prepare and plan_sweep raise, RunExistsError for a folder of another job, and
    TrainingError where no trial could report anything.
    """
    console = console or Console(quiet=True)
    machine = this_machine()
    must_have_secrets(spec)
    with ray_session(machine.cpus, machine.gpus):
        cluster = cluster_here()
        folder = SweepFolder(Path.cwd() / spec.storage / spec.name)
        slots, workers = slots_of(spec, cluster)
        if spec.distillation is not None:
            prepare(spec)  # its teacher takes what the slots would hold
        with _claimed(spec, folder, fresh), _fleet(spec, slots, workers, folder) as fleet:
            prepared = prepared_data(spec, console)
            plan = plan_sweep(spec, cluster, prepared)
            write_atomically(folder.spec, dump_spec(spec))
            write_json(folder.plan, plan.model_dump(mode="json"))
            send_chatter_to(folder.logs / "driver.log")
            status, message = _run(plan, folder, fleet, prepared, console)
            return finish(plan, folder, status, message)


@contextmanager
def _claimed(spec: JobSpec, folder: SweepFolder, fresh: bool) -> Iterator[None]:
    """The sweep's folder, for this process alone.

    Raises RunExistsError, before anything is started or written, for a folder of another job.
    """
    with claimed_folder(folder.root, fresh):
        old = read_json(folder.plan)
        if old is not None:
            changed = differences(old["spec"], spec.model_dump(mode="json"), MAY_CHANGE_IN_SWEEP)
            if changed:
                raise another_job(folder.root, changed)
        yield


@contextmanager
def _fleet(spec: JobSpec, slots: int, workers: Workers, folder: SweepFolder) -> Iterator[Fleet]:
    """The slots, started before there is a plan: their workers import while it is made.

    At the end of the block they are waited for; an error in it does not wait.
    """
    import ray

    from orchestrator.sweep.broker import Broker
    from orchestrator.sweep.fleet import Fleet

    assert spec.sweep is not None
    append_event(folder.events, "launch", slots=slots)
    name = f"broker-{uuid.uuid4().hex[:8]}"
    actor: Any = ray.remote(Broker)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # others may go
    options = {"name": name, "num_cpus": 0, "max_concurrency": 1000, "label_selector": here}
    broker: Any = actor.options(**options).remote(spec.sweep.max_trial_failures)
    fleet = Fleet(workers, slots, folder.root, broker, name)
    fleet.start()
    try:
        yield fleet
    except BaseException:
        broker.close.remote()
        raise
    fleet.join(LEAVE_S)


def _run(
    plan: SweepPlan,
    folder: SweepFolder,
    fleet: Fleet,
    prepared: dict[Split, Prepared],
    console: Console,
) -> tuple[str, str]:
    """Trials until there are no more; returns (status, why it ended early)."""
    import ray

    from orchestrator.sweep.director import Director  # imports Ray Tune, which ray_session prepares
    from orchestrator.sweep.tuning import make_tuner

    log = SweepLog(folder.log, plan.base.metric, plan.base.higher_is_better)
    broker = fleet.broker
    ray.get(broker.remember.remote(_spoken(log)))
    director = Director(plan, log, broker, folder, _planner(plan, prepared))
    tuner = make_tuner(director, fleet.broker_name, folder.root / "ray", plan.slots + 1)
    director.begin(plan.slots + 1)

    def tune() -> None:
        # Tune's processes would take their time from the slots' start.
        ray.get(broker.slot_came.remote())
        tuner.fit()

    tuning = _Background(tune)
    with (
        SweepView(folder, plan.num_trials, plan.slots, log, console) as view,
        stop_on_signals(lambda: _ask_to_stop(director), view.say),
    ):
        tuning.start()
        while tuning.is_alive():
            view.update()
            director.check_budget()
            if not fleet.alive() and director.live:
                director.stop("no slot could be kept running", broken=True)
            time.sleep(POLL_S)
        view.update()
    if tuning.error is not None:
        director.stop("Ray Tune failed")
        ray.get(broker.release.remote())
    director.close()
    ray.get(broker.close.remote())  # the slots leave while the best model is exported
    append_event(folder.events, "end", trials=len(log.trials))
    if tuning.error is not None:
        raise tuning.error
    if director.broken or (fleet.errors and not log.best()):
        raise TrainingError(_broken(director, fleet, folder))
    if director.stopping is None:
        return "finished", ""
    return ("stopped" if director.stopping == STOPPED else "budget"), director.stopping


STOPPED = "stopped on request; the same command goes on"


def _ask_to_stop(director: Director) -> bool:
    if director.stopping == STOPPED:
        return False
    director.stop(STOPPED)
    return True


def _spoken(log: SweepLog) -> dict[str, dict[int, tuple[bool, bool]]]:
    """Every verdict in the log."""
    return {
        t.id: {step: (v.go_on, v.save) for step, v in t.verdicts.items()}
        for t in log.trials.values()
    }


def _planner(plan: SweepPlan, prepared: dict[Split, Prepared]) -> Any:
    """Plans trials; rows are prepared anew where a searched field changes their fingerprint."""

    def make_plan(trial: str, values: Values) -> Plan:
        mine = prepared
        if any(path.split(".")[0] in ("data", "task", "model") for path in values):
            mine = prepare(parse_spec(with_values(plan.spec, values)))
        return plan_trial(plan, trial, values, mine)

    return make_plan


class _Background(threading.Thread):
    """A call off the main thread, which keeps the signals and the screen."""

    def __init__(self, call: Any) -> None:
        super().__init__(name="tune", daemon=True)
        self.call = call
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:  # noqa: BLE001, raised by _run
            self.error = error


def _broken(director: Director, fleet: Fleet, folder: SweepFolder) -> str:
    """What ended a sweep that nobody stopped. What has been done stays."""
    last = str(fleet.errors[-1]).strip().splitlines()[-12:] if fleet.errors else []
    why = "\n  ".join([f"{director.stopping or 'slots failed'}:", *last])
    return f"{why}\nLogs: {folder.logs}\nThe same command goes on."


def finish(plan: SweepPlan, folder: SweepFolder, status: str, message: str) -> SweepOutcome:
    """Best job, its exported model, report."""
    log = SweepLog(folder.log, plan.base.metric, plan.base.higher_is_better)
    best = log.best()
    if best is None and status == "finished":
        why = next((t.message for t in log.trials.values() if t.message), "")
        raise TrainingError(
            f"no trial reported anything. The first one said: {why}\nLogs: {folder.logs}"
        )
    exported = _export_best(plan, folder, best) if best is not None else None
    outcome = {
        "status": status, "message": message, "best": best.id if best else None,
        "value": best.best if best else None, "trials": len(log.trials),
    }  # fmt: skip
    write_json(folder.outcome, outcome)
    report = write_sweep_report(folder)
    return SweepOutcome(folder, plan, status, message, best, len(log.trials), exported, report)


def _export_best(plan: SweepPlan, folder: SweepFolder, best: TrialState) -> Path | None:
    from orchestrator.train.checkpoint import committed
    from orchestrator.train.export import export_run, load_plan

    write_atomically(folder.best, best_job(plan, best))
    mine = folder.trial(best.id)
    if not committed(mine.checkpoints):
        return folder.export if folder.export.exists() else None
    step = max(s for s in best.reports if best.reports[s][plan.base.metric] == best.best)
    figures = {"best": {"step": step, **best.reports[step]}}
    return export_run(load_plan(mine), mine, folder.export, figures)


def best_job(plan: SweepPlan, best: TrialState) -> str:
    """The job with the best trial's values, as YAML that `train` takes."""
    data = with_values(plan.spec, {**best.values, "name": f"{plan.spec.name}-best"})
    return dump_spec(parse_spec(data))
