"""What a sweep decides beside its decisions: when it stops, what it keeps, what it goes on with."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweeps
import tiny
from test_plan import prepared
from test_slots import nodes
from test_sweep_plan import Asked
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.cli.sweeps import best_job, job_of_sweep
from orchestrator.errors import CheckpointError, RunExistsError, TrainingError
from orchestrator.launch.run_lock import locked_folder
from orchestrator.metric import Metric
from orchestrator.plan.resources import Workers
from orchestrator.report.records import append_event
from orchestrator.report.runs import runs_table
from orchestrator.report.sweep_view import Standing, SweepView, results_table
from orchestrator.report.trial_log import Decision, SweepLog
from orchestrator.run_folder import SweepFolder, in_use, read_json, write_json
from orchestrator.spec import JobSpec, dump_spec, load_spec
from orchestrator.sweep import finalize
from orchestrator.sweep import run as run_module
from orchestrator.sweep.controller import SweepController
from orchestrator.sweep.plan import SweepPlan, first_rung, plan_sweep, plan_trial, rungs_of
from orchestrator.sweep.pool import WorkerGroupPool
from orchestrator.sweep.run import _locked_sweep, _must_have_the_same_rows, _planner, _spent_s
from orchestrator.sweep.show import show_sweep

SPACE = {"optimizer.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}}


@pytest.fixture
def job(models: tiny.Tiny, tmp_path: Path) -> Any:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(4))

    def make(
        data: dict[str, Any] | None = None, steps: int = 90, rows_per_step: int = 10, **sweep: Any
    ) -> JobSpec:
        return tiny.job(
            models.bert, rows, tmp_path, data=data or {"eval": str(rows)}, stop={"max_steps": steps},
            batch={"global_batch_size": rows_per_step}, sweep={"space": SPACE, **sweep},
        )  # fmt: skip

    return make


def planned(spec: JobSpec) -> SweepPlan:
    return plan_sweep(spec, nodes((4, 0)), prepared(rows=1000, longest=20, eval_rows=50))


@pytest.fixture
def directed(job: Any, tmp_path: Path) -> Iterator[Any]:
    """`directed(num_trials=…, …)`: a controller, its log beside it, and a broker that only notes."""
    made: list[SweepController] = []

    def make(spent_s: float = 0.0, **sweep: Any) -> SweepController:
        plan = planned(job(**sweep))
        log = SweepLog(tmp_path / "log.jsonl", Metric("accuracy", maximize=True))
        folder = SweepFolder(tmp_path / "sweep")
        made.append(SweepController(plan, log, Asked(), folder, lambda *_: plan.base, spent_s))
        return made[-1]

    yield make
    for one in made:
        one.close()


def begin(controller: SweepController, index: int, **values: Any) -> str:
    trial = f"t{index:05d}"
    controller.log.trial(trial, index, values, None)
    controller.decisions.proposed(controller.log.trials[trial])
    controller.live.add(trial)
    controller._with_checkpoints.add(trial)
    controller.per_step[trial] = 1.0
    return trial


def tell(controller: SweepController, trial: str, step: int, value: float) -> None:
    said = {"trial": trial, "step": step, "metrics": {"accuracy": value}, "last": False}
    controller.reported(said)


def end(controller: SweepController, trial: str, status: str = "pruned", step: int = 10) -> None:
    controller.ended({"trial": trial, "status": status, "step": step, "message": "why"})


# --- when it stops


def test_patience_counts_trials_that_ended_since_the_best_got_better(directed: Any) -> None:
    controller = directed(budget={"patience_trials": 3}, num_trials=20)
    first, others = begin(controller, 0), [begin(controller, i) for i in range(1, 7)]
    tell(controller, first, 10, 0.5)
    for step, other in zip((20, 30, 40, 50), others, strict=False):
        tell(controller, other, 10, 0.1)
        end(controller, other)
        tell(controller, first, step, 0.5 + step / 1000)
        assert controller.stopping is None, "the best still improves"
    for other in others[4:]:
        end(controller, other)
    assert controller.stopping is None
    end(controller, begin(controller, 7), "failed")
    controller.check_budget()
    assert controller.stopping == "the best has not improved for 3 trials"


def test_patience_does_not_count_before_there_is_a_best(directed: Any) -> None:
    controller = directed(budget={"patience_trials": 2}, num_trials=20)
    for index in range(4):
        end(controller, begin(controller, index), "diverged")
    controller.check_budget()
    assert controller.stopping is None


def test_steps_of_all_trials_are_a_budget(directed: Any) -> None:
    controller = directed(budget={"max_steps_total": 50}, num_trials=20)
    one, other = begin(controller, 0), begin(controller, 1)
    tell(controller, one, 30, 0.5)
    tell(controller, other, 10, 0.5)
    assert controller.stopping is None
    tell(controller, one, 40, 0.4)
    assert controller.stopping == "sweep.budget.max_steps_total = 50 are used up"


def test_time_is_a_budget_of_all_launches_together(directed: Any, tmp_path: Path) -> None:
    controller = directed(budget={"max_time_s": 100}, num_trials=20, spent_s=90)
    controller.check_budget()
    assert controller.stopping is None
    controller = directed(budget={"max_time_s": 100}, num_trials=20, spent_s=101)
    controller.check_budget()
    assert controller.stopping == "sweep.budget.max_time_s = 100 is used up"


def test_the_time_between_launches_does_not_count(tmp_path: Path) -> None:
    import time

    folder, now = SweepFolder(tmp_path), time.time()
    launches = [{"time": now - 5000, "kind": "launch"}, {"time": now - 300, "kind": "launch"}]
    killed = [{"time": now - 4990, "kind": "trial"}, {"time": now - 4960, "kind": "report"}]
    sweeps.write_lines(folder.events, launches)
    sweeps.write_lines(folder.log, [*killed, {"time": now - 250, "kind": "report"}])
    assert _spent_s(folder) == pytest.approx(40 + 300, abs=5)


def test_a_trial_that_could_not_write_ends_the_launch_and_no_trial(directed: Any) -> None:
    controller = directed(num_trials=20)
    full, other = begin(controller, 0), begin(controller, 1)
    controller.folder.root.mkdir(parents=True)
    controller.folder.reserve.write_bytes(b"0")
    controller.folder.trial(other).root.mkdir(parents=True)
    end(controller, full, "storage_failed")
    assert (controller.stopping, controller.broken) == ("t00000: why", True)
    assert controller.log.trials[full].status is None, "the same command goes on with it"
    assert not controller.folder.reserve.exists(), "there is room to say what happened"
    assert controller.folder.trial(other).stop_request.exists()


# --- what it keeps


def test_checkpoints_of_the_best_trials_are_kept_and_no_others(directed: Any) -> None:
    controller = directed(num_trials=20, keep_trials=2, scheduler={"type": "none"})
    values = [0.5, 0.9, 0.7, 0.7, 0.8, 0.1]
    for index, value in enumerate(values):
        trial = begin(controller, index)
        controller.folder.trial(trial).checkpoints.mkdir(parents=True)
        tell(controller, trial, 90, value)
        end(controller, trial, "finished", 90)
    running = begin(controller, 6)
    controller.folder.trial(running).checkpoints.mkdir(parents=True)
    tell(controller, running, 10, 0.0)
    end(controller, begin(controller, 7), "failed")
    trials = controller.folder.root / "trials"
    kept = sorted(p.name for p in trials.iterdir() if (p / "checkpoints").exists())
    assert kept == ["t00001", "t00004", "t00006"]
    assert controller._with_checkpoints == {*kept}, "what is gone is not looked at again"
    assert controller.per_step.keys() == {"t00006"}, "nothing is kept of trials that ended"


def test_of_equal_values_the_first_is_exported_which_is_the_one_that_was_saved(
    tmp_path: Path,
) -> None:
    log = SweepLog(tmp_path / "log", Metric("accuracy", maximize=True))
    log.trial("t", 0, {}, None)
    for step, value in ((6, 0.84), (12, 0.7), (18, 0.84)):
        saved = log.is_among_best(value, log.trials["t"], 1)
        assert saved is (step == 6)
        log.report("t", step, step, {"accuracy": value}, Decision(True, saved))
    assert finalize.best_step(log.trials["t"], "accuracy") == 6


def test_a_member_whose_last_value_is_no_number_is_nobody_s_parent(directed: Any) -> None:
    controller = directed(
        num_trials=4, scheduler={"type": "pbt", "generations": 2, "quantile": 0.5}
    )
    for index, value in enumerate((math.nan, 0.9, 0.2, 0.8)):
        trial = begin(controller, index, **{"optimizer.lr": 1e-4})
        tell(controller, trial, 10, 0.1)
        tell(controller, trial, 45, value)
        end(controller, trial, "pruned", 45)
    parents = []
    for index in range(4, 8):
        heir = controller._next_of_population(controller.plan.sweep.scheduler, index)
        parents.append(heir.parent[0])
        controller.log.trial(heir.id, index, heir.values, heir.parent)
    assert set(parents) <= {"t00001", "t00003"}
    assert controller.plan.planned_trials == 8


# --- rungs and rows


def test_trials_of_other_lengths_meet_at_the_same_rungs(job: Any) -> None:
    plan = planned(job(num_trials=9))
    for steps, want in ((45, (10, 30, 45)), (90, (10, 30, 90)), (300, (10, 30, 90, 270, 300))):
        values = {"stop.max_steps": steps}
        assert plan_trial(plan, "t", values, prepared(1000, 20, 50)).rungs == want


def test_a_trial_that_is_compared_at_a_rung_has_come_so_far_in_its_unit() -> None:
    from orchestrator.spec.sweep import AshaScheduler, SweepSpec

    rng = random.Random(3)
    for _ in range(3000):
        factor = rng.randint(2, 4)
        asha = AshaScheduler(unit="tokens", reduction_factor=factor)
        sweep = SweepSpec(space={"seed": (1,)}, scheduler=asha)
        facts = SimpleNamespace(rows=rng.randint(1, 10**5), tokens=rng.randint(10**4, 10**8))
        base, other = (
            SimpleNamespace(train_data=facts, global_batch_size=rng.randint(1, 300), total_steps=rng.randint(5, 5000))
            for _ in range(2)
        )  # fmt: skip
        first = first_rung(sweep, base)  # type: ignore[arg-type]
        per_step = facts.tokens / facts.rows * other.global_batch_size
        for step in rungs_of(sweep, base, other, {})[:-1]:  # type: ignore[arg-type]
            key = float(round(step * per_step))
            passed = sum(key >= first * factor**k for k in range(40))
            before = sum(
                float(round((step - 1) * per_step)) >= first * factor**k for k in range(40)
            )
            assert passed > before or first * factor**before - (step - 1) * per_step <= 0.5
        assert rungs_of(sweep, base, base, {})[0] <= max(math.ceil(base.total_steps / factor**2), 1)  # type: ignore[arg-type]


def test_rows_are_prepared_once_per_value_that_changes_them(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[JobSpec] = []
    rows = prepared(rows=1000, longest=20, eval_rows=50)
    monkeypatch.setattr(run_module, "prepare", lambda spec: asked.append(spec) or rows)
    space = {**SPACE, "seed": [1, 2], "data.max_length_tokens": [16, 32]}
    make = _planner(planned(job(space=space, num_trials=3)), rows)
    make("a", {"optimizer.lr": 1e-4, "seed": 1})
    assert asked == []
    for length in (16, 32, 16, 32):
        make("a", {"optimizer.lr": 1e-4, "data.max_length_tokens": length})
    assert [spec.data.max_length_tokens for spec in asked] == [16, 32]
    held_out = planned(job({"eval_fraction": 0.5}, space=space, num_trials=3))
    make = _planner(held_out, rows)
    for seed in (1, 2, 1):
        make("a", {"seed": seed})
    assert [spec.seed for spec in asked[2:]] == [1, 2], "the seed says which rows are held out"


def test_a_sweep_whose_rows_have_changed_is_not_gone_on_with(job: Any, tmp_path: Path) -> None:
    plan, folder = planned(job(num_trials=3)), SweepFolder(tmp_path / "sweep")
    _must_have_the_same_rows(folder, plan)
    write_json(folder.plan, plan.model_dump(mode="json"))
    _must_have_the_same_rows(folder, plan)
    other = plan.base.eval_data.model_copy(update={"folder": "elsewhere/other"})  # type: ignore[union-attr]
    edited = plan.model_copy(update={"base": plan.base.model_copy(update={"eval_data": other})})
    with pytest.raises(RunExistsError, match="the content of the evaluation data"):
        _must_have_the_same_rows(folder, edited)


# --- how it ends


def test_a_sweep_that_fails_still_leaves_its_outcome_and_report(
    directed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = directed(num_trials=3)
    folder = controller.folder
    controller.log.path = folder.log
    tell(controller, begin(controller, 0), 10, 0.5)
    write_json(folder.plan, controller.plan.model_dump(mode="json"))

    def fail(*_: Any) -> None:
        raise CheckpointError("nothing is left of it")

    monkeypatch.setattr(finalize, "_export_best", fail)
    for status, message in (("finished", ""), ("failed", "slots failed: why")):
        with pytest.raises(TrainingError, match="could not be exported: nothing is left") as error:
            finalize.finish(controller.plan, folder, status, message)
        assert message in str(error.value)
        outcome = read_json(folder.outcome)
        assert (outcome["status"], outcome["best"]) == ("failed", "t00000")
        assert folder.report.exists()


def test_a_worker_that_hangs_is_taken_for_dead_after_the_job_s_time_in_a_slot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "600")
    WorkerGroupPool(Workers(1, 0, 1), 1, tmp_path, None, "broker", 7.5)._trainer(0, 1)
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "7.5"


# --- what people see


def seen_by(*parts: Any) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


def test_a_plan_says_what_is_in_flight_and_once_measured_when_it_ends(
    job: Any, tmp_path: Path
) -> None:
    plan, folder = planned(job(num_trials=9)), sweeps.make_sweep(tmp_path / "old", 6).write()
    text = " ".join(seen_by(show_sweep(plan, SweepFolder(tmp_path / "new"))).split())
    assert "slots 4 4 CPUs, 1 × 1 per trial" in text
    assert "trials in flight 5 one more than slots" in text
    assert "10 100 9" in text, "step, rows and trials of the first rung"
    assert "expected time left" not in text
    text = " ".join(seen_by(show_sweep(plan, folder)).split())
    assert "expected time left" in text
    assert "expected end 20" in text
    several = planned(job(space={"resources.num_workers": [1, 2]}, num_trials=9))
    text = " ".join(seen_by(show_sweep(several, folder)).split())
    assert "up to 8 times a slot is rebuilt" in text


def test_trials_without_an_end_run_wait_or_are_left(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "s", 3)
    made.trial(3, {"optimizer.lr": 1e-4}, until=6)
    made.log.append(
        {"time": sweeps.START, "kind": "trial", "trial": "t9", "index": 9, "values": {}, "parent": None}
    )  # fmt: skip
    folder = made.write(status=None, milestones=[5, 15])
    log = SweepLog(folder.log, Metric("accuracy", maximize=True))
    left = Standing(folder)
    assert [left.of(log.trials[t]) for t in ("t00003", "t9")] == ["unfinished", "unfinished"]
    assert "unfinished" in seen_by(results_table(log, folder))
    with locked_folder(folder.root, fresh=False):
        assert in_use(folder.root)
        under_way = Standing(folder)
        assert [under_way.of(log.trials[t]) for t in ("t00003", "t9")] == ["running", "waiting"]
        assert under_way.rung(log.trials["t00003"]) == "1/3"
        ended = next(t for t in log.trials.values() if t.status == "finished")
        assert under_way.rung(ended) == "end"
        view = SweepView(folder, 8, 4, log, SimpleNamespace(is_terminal=False))  # type: ignore[arg-type]
        assert "3 of 8 trials ended  ·  1 of 4 slots busy" in view._summary()
        assert "running" in seen_by(runs_table(tmp_path))
        append_event(folder.events, "launch", slots=4)
        assert Standing(folder).of(log.trials["t00003"]) == "waiting", "left by the launch before"
    assert not in_use(folder.root)
    assert "unfinished" in seen_by(runs_table(tmp_path))


# --- the command line


def test_a_sweep_goes_on_in_its_own_folder_wherever_its_name_is_said(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(num_trials=3).model_copy(update={"storage_path": "runs"})
    monkeypatch.chdir(tmp_path)
    folder = SweepFolder(tmp_path / "runs" / spec.name)
    with _locked_sweep(spec, folder, fresh=False):
        append_event(folder.events, "launch", slots=2)  # killed here, before there was a plan
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, storage in ((spec.name, tmp_path / "runs"), (str(folder.root), Path("runs"))):
        found = job_of_sweep(Path(name), storage, ["sweep.num_trials=5"])
        assert Path.cwd() / found.storage_path / found.name == folder.root
        assert found.sweep is not None
        assert found.sweep.num_trials == 5
    (tmp_path / "begun").mkdir()
    append_event(folder.events, "launch", slots=1, work_dir=str(tmp_path / "begun"))
    job_of_sweep(folder.root, Path("runs"), [])
    assert Path.cwd() == tmp_path / "begun", "relative paths lead where they led then"
    missing = CliRunner().invoke(app, ["sweep", "nowhere.yaml"])
    assert missing.exit_code != 0
    assert "no such sweep" in str(missing.exception)


def test_the_best_job_is_not_bound_to_the_size_of_a_slot(job: Any, tmp_path: Path) -> None:
    folder = sweeps.make_sweep(tmp_path / "done", 2).write()
    data = json.loads(job(num_trials=3).model_dump_json(exclude_unset=True))
    data.pop("sweep")
    data["resources"] = {"num_workers": 3, "gpus_per_worker": 0.25, "cpus_per_worker": 2}
    from orchestrator.spec import parse_spec

    folder.best.write_text(dump_spec(parse_spec(data)))
    assert load_spec(folder.best, []).resources.gpus_per_worker == 0.25
    best = best_job(Path("done"), tmp_path, ["resources.cpus_per_worker=7"]).resources
    assert (best.num_workers, best.gpus_per_worker, best.cpus_per_worker) == ("auto", "auto", 7)
