"""A sweep from job to best model: prepare, plan, lock, pool, Tune, export."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.data.prepare import Prepared, Split, find_prepared, prepare
from orchestrator.effects import may_change_on_resume, names_content
from orchestrator.launch.ray_watch import RayWatch
from orchestrator.launch.run import (
    cluster_here,
    must_have_secrets,
    prepared_data,
)
from orchestrator.launch.run_lock import (
    another_job,
    at_saved_stage,
    compare_content,
    differences,
    locked_folder,
)
from orchestrator.launch.session import attached_address, ray_session, send_chatter_to
from orchestrator.launch.signals import stop_on_signals
from orchestrator.plan import Cluster, Plan, this_machine
from orchestrator.plan.slots import Slots, slots_of
from orchestrator.report.records import append_event, read_records
from orchestrator.report.sweep_stats import attempts
from orchestrator.report.sweep_view import SweepView
from orchestrator.report.terminal import Terminal
from orchestrator.report.trial_log import SweepLog
from orchestrator.run_folder import SweepFolder, read_object, write_atomically, write_json
from orchestrator.spec import JobSpec, dump_spec, parse_spec
from orchestrator.spec.search_space import Values
from orchestrator.spec.sweep_rules import with_values
from orchestrator.sweep.finalize import SweepOutcome, finish
from orchestrator.sweep.plan import SweepPlan, plan_sweep, plan_trial

if TYPE_CHECKING:
    from orchestrator.sweep.controller import MakePlan, SweepController
    from orchestrator.sweep.pool import WorkerGroupPool

POLL_S = 0.2
LEAVE_S = 60.0
"""How long slots may take to leave when there is nothing left to do."""


def make_sweep_plan(spec: JobSpec, cluster: Cluster | None = None) -> SweepPlan:
    """The plan of a sweep, its data prepared first where it is not. Raises what plan_sweep raises."""
    prepared = find_prepared(spec)
    if prepared is None:
        with ray_session():
            prepared = prepare(spec)
    return plan_sweep(spec, cluster or this_machine(), prepared)


def sweep(spec: JobSpec, fresh: bool = False, console: Console | None = None) -> SweepOutcome:
    """Run a sweep to its end, or on from where it stopped.

    Raises what prepare and plan_sweep raise, RunExistsError for a folder of another job, and
    TrainingError where no trial could report anything.
    """
    console = console or Terminal(quiet=True)
    must_have_secrets(spec)
    with ray_session():
        cluster = cluster_here()
        folder = SweepFolder(Path.cwd() / spec.storage_path / spec.name)
        slots = slots_of(spec, cluster)
        if spec.distillation is not None:
            prepare(spec)  # its teacher takes what the slots would hold
        with _locked_sweep(spec, folder, fresh), _pool(spec, slots, folder) as pool:
            prepared = prepared_data(spec, console)
            plan = plan_sweep(spec, cluster, prepared)
            _must_have_the_same_rows(folder, plan)
            write_json(folder.plan, plan.model_dump(mode="json"))
            folder.outcome.unlink(missing_ok=True)
            send_chatter_to(folder.logs / "driver.log")
            status, message = _run(plan, folder, pool, prepared, console)
            return finish(plan, folder, status, message)


@contextmanager
def _locked_sweep(spec: JobSpec, folder: SweepFolder, fresh: bool) -> Iterator[None]:
    """The sweep's folder, for this process alone.

    Raises RunExistsError, before anything is started or written, for a folder of another job. The job is
    written first of all: by the sweep's name it goes on from there, however early it was killed.
    """
    with locked_folder(folder.root, fresh):
        old = read_object(folder.plan, {"spec": dict, "base": dict})
        if old is not None:
            new = spec.model_dump(mode="json")
            changed = differences(
                old["spec"],
                new,
                lambda path: names_content(JobSpec, path) or may_change_on_resume(JobSpec, path),
            )
            if changed:
                raise another_job(folder.root, changed)
        write_atomically(folder.spec, dump_spec(spec))
        yield


def _must_have_the_same_rows(folder: SweepFolder, plan: SweepPlan) -> None:
    """Raises RunExistsError where trials of an earlier launch were trained or compared on other rows."""
    read = read_object(folder.plan, {"spec": dict, "base": dict})
    if read is None:
        return
    new = plan.base.model_dump(mode="json")
    same, changed = compare_content(read["base"], new, folder.plan)
    spec = plan.spec.model_dump(mode="json")
    changed += differences(
        read["spec"], spec, lambda path: path in same or may_change_on_resume(JobSpec, path)
    )
    if changed:
        raise another_job(folder.root, changed)


@contextmanager
def _pool(spec: JobSpec, slots: Slots, folder: SweepFolder) -> Iterator[WorkerGroupPool]:
    """The slots, started before there is a plan: their workers import while it is made.

    At the end of the block they are waited for; an error in it does not wait.
    """
    import ray

    from orchestrator.sweep.broker import Broker
    from orchestrator.sweep.pool import WorkerGroupPool

    assert spec.sweep is not None
    append_event(folder.events, "launch", slots=slots.count, work_dir=str(Path.cwd()))
    name = f"broker-{uuid.uuid4().hex[:8]}"
    actor: Any = ray.remote(Broker)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # others may go
    options = {"name": name, "num_cpus": 0, "max_concurrency": 1000, "label_selector": here}
    broker: Any = actor.options(**options).remote(spec.sweep.max_trial_failures)
    pool = WorkerGroupPool(
        slots.workers, slots.count, folder.root, broker, name, spec.fault_tolerance.health_timeout_s
    )
    pool.start()
    try:
        yield pool
    except BaseException:
        broker.close.remote()
        raise
    pool.join(LEAVE_S)


def _run(
    plan: SweepPlan,
    folder: SweepFolder,
    pool: WorkerGroupPool,
    prepared: dict[Split, Prepared],
    console: Console,
) -> tuple[str, str]:
    """Trials until there are no more; returns (status, why it ended early)."""
    import ray

    from orchestrator.sweep.controller import (
        SweepController,  # imports Ray Tune, which ray_session prepares
    )
    from orchestrator.sweep.tuning import make_tuner

    log = SweepLog(folder.log, plan.base.selection_metric)
    broker = pool.broker
    ray.get(broker.remember.remote(_spoken(log)))
    controller = SweepController(
        plan, log, broker, folder, _planner(plan, prepared), _spent_s(folder)
    )
    tuner = make_tuner(controller, pool.broker_name, folder.root / "ray", plan.slots + 1)
    controller.begin(plan.slots + 1)

    def tune() -> None:
        # Tune's processes would take their time from the slots' start.
        ray.get(broker.slot_came.remote())
        tuner.fit()

    tuning = _Background(tune)
    with (
        SweepView(
            folder, plan.planned_trials, plan.slots, log, console, attached_address() is not None
        ) as view,
        stop_on_signals(lambda: _ask_to_stop(controller), view.say),
    ):
        watch = RayWatch()
        tuning.start()
        while tuning.is_alive():
            if why := watch.lost():
                return "failed", f"{why} The same command resumes the sweep."
            view.update()
            controller.check_budget()
            if not pool.alive() and controller.live:
                controller.stop("no slot could be kept running", broken=True)
            time.sleep(POLL_S)
        view.update()
    if tuning.error is not None:
        controller.stop(f"Ray Tune failed: {tuning.error}", broken=True)
        ray.get(broker.release.remote())
    controller.close()
    ray.get(broker.close.remote())  # the slots leave while the best model is exported
    with suppress(OSError):  # a full disk must not hide what happened
        append_event(folder.events, "end", trials=len(log.trials))
    if controller.broken or (pool.errors and not log.best()):
        return "failed", _broken(controller, pool, folder)
    if controller.stopping is None:
        return "finished", ""
    return ("stopped" if controller.stopping == STOPPED else "budget"), controller.stopping


def _spent_s(folder: SweepFolder) -> float:
    """Seconds of all launches so far, this one's included; not the time between them."""
    events = read_records(folder.events)
    times = [float(r["time"]) for r in (*events, *read_records(folder.log))]
    starts = [float(e["time"]) for e in events if e["kind"] == "launch"]
    before = attempts(starts, times)[:-1]
    return sum(last - began for began, last in before) + time.time() - starts[-1]


STOPPED = "stopped on request; the same command goes on"


def _ask_to_stop(controller: SweepController) -> bool:
    if controller.stopping == STOPPED:
        return False
    controller.stop(STOPPED)
    return True


def _spoken(log: SweepLog) -> dict[str, dict[int, tuple[bool, bool]]]:
    """Every decision in the log."""
    return {
        t.id: {step: (v.go_on, v.save) for step, v in t.decisions.items()}
        for t in log.trials.values()
    }


def _planner(plan: SweepPlan, prepared: dict[Split, Prepared]) -> MakePlan:
    """Plans trials; rows are prepared anew, once per value, where a searched field changes what they are."""
    sections = {"data", "task", "model"}
    if plan.spec.data.eval_fraction is not None:  # the seed says which rows are held out
        sections.add("seed")
    found: dict[str, dict[Split, Prepared]] = {}

    def rows(values: Values) -> dict[Split, Prepared]:
        own = {path: v for path, v in values.items() if path.split(".")[0] in sections}
        if not own:
            return prepared
        key = json.dumps(own, sort_keys=True, default=str)
        if key not in found:
            found[key] = prepare(parse_spec(with_values(plan.spec, values)))
        return found[key]

    def make_plan(trial: str, values: Values) -> Plan:
        return at_saved_stage(plan_trial(plan, trial, values, rows(values)))

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


def _broken(controller: SweepController, pool: WorkerGroupPool, folder: SweepFolder) -> str:
    """What ended a sweep that nobody stopped. What has been done stays."""
    last = str(pool.errors[-1]).strip().splitlines()[-12:] if pool.errors else []
    why = "\n  ".join([f"{controller.stopping or 'slots failed'}:", *last])
    return f"{why}\nLogs: {folder.logs}\nThe same command goes on."
