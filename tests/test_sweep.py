"""Sweeps on real slots: the same answers as trials alone, nothing lost, no trial ends the others."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
from group import figures, run_trials
from transformers import AutoConfig, BertForSequenceClassification

from orchestrator.plan.fit import Load
from orchestrator.report.records import read_records, read_steps
from orchestrator.report.trial_log import SweepLog, open_log
from orchestrator.run_folder import SweepFolder, read_json
from orchestrator.spec import JobSpec, load_spec
from orchestrator.sweep.finalize import SweepOutcome
from orchestrator.sweep.run import sweep
from orchestrator.train.checkpoint import committed, newest_valid
from orchestrator.train.export import load_exported, load_plan

STEPS = 36


def job(
    models: tiny.Tiny, folder: Path, name: str, search: dict[str, Any], **fields: Any
) -> JobSpec:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "name": name,
        "batch": {"global_batch_size": 8},
        "stop": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 6},
        "evaluation": {"every_steps": "end"},
        "resources": {"num_workers": 1},
        "model": {"dropout": 0.1},
        "data": {"eval": str(tiny.write_csv(folder / "eval.csv", tiny.labeled(41, seed=1)))},
        "sweep": search,
        **fields,
    }
    train = tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(203))
    return tiny.job(models.bert, train, folder, **settings)


def lr(low: float = 1e-5, high: float = 1e-2) -> dict[str, Any]:
    return {"type": "log_uniform", "low": low, "high": high}


@pytest.fixture(scope="module")
def done(ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> SweepOutcome:
    """Trials of two ZeRO stages on two slots, one that diverges and one that cannot be planned."""
    search = {
        "space": {
            "optimizer.lr": [1e-3, 1e-4, 1e38, 3e-4],
            "zero.stage": [2, 3],
            "schedule.warmup_steps": {"values": [4, STEPS + 1], "when": {"zero.stage": 3}},
        },
        "constraints": ["optimizer.lr < 1 or zero.stage == 2", "optimizer.lr != 0.0003 or zero.stage == 2"],
        "searcher": {"type": "grid"},
        "scheduler": {"type": "none"},
        "max_concurrent_trials": 2,
    }  # fmt: skip
    return sweep(job(models, tmp_path_factory.mktemp("sweep"), "grid", search))


def test_a_trial_in_a_warm_slot_gives_what_it_gives_alone(
    ray: Any, done: SweepOutcome, tmp_path: Path
) -> None:
    log = open_log(done.folder)
    finished = [t for t in log.trials.values() if t.status == "finished"]
    assert len(finished) == 5
    plans = [
        load_plan(done.folder.trial(t.id)).model_copy(update={"run_dir": str(tmp_path / t.id)})
        for t in finished
    ]
    plans.sort(key=lambda plan: plan.stage)  # in the slots one of ZeRO 3 may have run before
    for plan in plans:
        Path(plan.run_dir).mkdir()
    for plan, alone in zip(plans, run_trials(plans), strict=True):
        trial = log.trials[Path(plan.run_dir).name]
        assert figures(load_plan(done.folder.trial(trial.id))) == figures(plan)
        assert trial.reports[STEPS]["loss"] == alone["last_eval"]["loss"], trial.id


def test_a_trial_that_diverges_or_cannot_be_planned_ends_alone(done: SweepOutcome) -> None:
    by_status: dict[str, list[str]] = {}
    for trial in open_log(done.folder).trials.values():
        by_status.setdefault(str(trial.status), []).append(trial.message)
    assert {k: len(v) for k, v in by_status.items()} == {"finished": 5, "diverged": 1, "failed": 2}
    assert all("warm-up must end before" in message for message in by_status["failed"])
    assert done.status == "finished"


def test_a_trial_that_runs_out_of_memory_ends_alone_and_says_so(
    ray: Any, models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "fits", lambda self, stage, rows: True)  # the plan would refuse it
    more_than_there_are_addresses = 2**45
    search = {
        "space": {"model.config.intermediate_size": [64, more_than_there_are_addresses, 32]},
        "searcher": {"type": "grid"},
        "scheduler": {"type": "none"},
        "max_concurrent_trials": 1,
    }
    config = AutoConfig.from_pretrained(models.bert).to_dict()
    kept = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    model = {
        "pretrained": None,
        "config": {name: config[name] for name in kept},
        "tokenizer": str(models.bert),
    }
    spec = job(
        models, tmp_path, "memory", search,
        model=model, tuning={"freeze": ["bert*"]}, stop={"max_steps": 6},
    )  # fmt: skip
    outcome = sweep(spec)
    assert outcome.status == "finished"
    trials = list(open_log(outcome.folder).trials.values())
    assert [t.status for t in trials] == ["finished", "failed", "finished"]
    assert "can't allocate memory" in trials[1].message
    assert all(t.step == 6 for t in trials if t.status == "finished")


def test_the_best_trial_is_exported_and_its_job_can_be_trained(done: SweepOutcome) -> None:
    assert done.best is not None
    assert done.export is not None
    plan, model, _ = load_exported(done.export)
    assert plan.spec.optimizer.lr == done.best.values["optimizer.lr"]
    assert model.num_labels == 2
    best = load_spec(done.folder.best)
    assert (best.name, best.sweep) == ("grid-best", None)
    assert best.optimizer.lr == done.best.values["optimizer.lr"]
    kept = [p.name for p in (done.folder.root / "trials").iterdir() if (p / "checkpoints").exists()]
    assert kept == [done.best.id]


def test_a_slot_leaks_nothing_from_trial_to_trial_and_is_rebuilt_for_another_number_of_workers(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    """20 trials that differ in a field that changes nothing, the last two on two workers."""
    search = {
        "space": {"resources.num_workers": [1, 2], "stop.max_epochs": list(range(20, 38))},
        "constraints": ["resources.num_workers == 1 or stop.max_epochs < 22"],
        "searcher": {"type": "grid"},
        "scheduler": {"type": "none"},
        "max_concurrent_trials": 1,
    }
    spec = job(models, tmp_path, "twenty", search, stop={"max_steps": 4})
    outcome = sweep(spec)
    log = open_log(outcome.folder)
    by_workers: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for trial in log.trials.values():
        assert trial.status == "finished", trial.message
        by_workers[load_plan(outcome.folder.trial(trial.id)).num_workers].append(trial.reports)
    assert (len(by_workers[1]), len(by_workers[2])) == (18, 2)
    for reports in by_workers.values():
        assert all(other == reports[0] for other in reports)
    one, two = (reports[0][4]["loss"] for reports in by_workers.values())
    assert one == pytest.approx(two, rel=0.2), "the same batches, other dropout"
    events = [e for t in log.trials for e in read_records(outcome.folder.trial(t).events)]
    began = [e["workers"] for e in events if e["kind"] == "find"]
    assert began == [1] * 18 + [2] * 2


def test_pbt_hands_checkpoints_of_winners_to_losers(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    search = {
        "space": {"optimizer.lr": lr()},
        "num_trials": 4,
        "scheduler": {"type": "pbt", "generations": 3},
        "max_concurrent_trials": 2,
    }
    outcome = sweep(job(models, tmp_path, "pbt", search))
    log = open_log(outcome.folder)
    assert len(log.trials) == 12
    heirs = [t for t in log.trials.values() if t.parent and t.parent[0][:4] != t.id[:4]]
    assert len(heirs) == 2, "one loser per generation"
    for heir in heirs:
        parent, step = heir.parent or ("", 0)
        began = read_records(outcome.folder.trial(heir.id).events)
        assert [e["step"] for e in began if e["kind"] == "stream"] == [step]
        assert heir.values != log.trials[parent].values
    assert {t.step for t in log.trials.values() if t.id.endswith("g02")} == {STEPS}


def test_trials_whose_time_is_up_end_as_finished_and_so_does_their_population(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    search = {
        "space": {"optimizer.lr": lr()},
        "num_trials": 4,
        "scheduler": {"type": "pbt", "generations": 3},
        "max_concurrent_trials": 2,
    }
    stop = {"max_steps": STEPS, "max_time_s": 1e-3}
    outcome = sweep(job(models, tmp_path, "timed", search, stop=stop))
    trials = open_log(outcome.folder).trials.values()
    assert [(t.status, t.step) for t in trials] == [("finished", 1)] * 4
    assert all("stop.max_time_s" in t.message for t in trials)
    assert (outcome.status, outcome.export is not None) == ("finished", True)


def test_the_trials_of_a_sweep_learn_from_one_teacher_asked_once(
    ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    search = {
        "space": {"distillation.alpha": [0.2, 0.9], "distillation.temperature": [1.0, 4.0]},
        "searcher": {"type": "grid"},
        "scheduler": {"type": "none"},
        "max_concurrent_trials": 1,
    }
    config = AutoConfig.from_pretrained(models.bert, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    for file in models.bert.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "teacher")
    taught = {
        "distillation": {"teacher": str(tmp_path / "teacher")},
        "optimizer": {"lr": 1e-2},
        "stop": {"max_steps": 3},
    }
    outcome = sweep(job(models, tmp_path, "taught", search, **taught))
    trials = open_log(outcome.folder).trials.values()
    assert [t.status for t in trials] == ["finished"] * 4
    plans = [load_plan(outcome.folder.trial(t.id)) for t in trials]
    (answers,) = {plan.train_data.teacher_folder for plan in plans}
    assert [str(f) for f in (tmp_path / "prepared").glob("*-teacher-*")] == [answers]
    assert len({t.reports[3]["loss"] for t in trials}) == 4, "each learns in its own way"
    best = load_spec(outcome.folder.best)
    assert best.distillation is not None
    assert best.distillation.teacher == str(tmp_path / "teacher")


ASHA = {
    "space": {"optimizer.lr": lr(), "optimizer.weight_decay": [0.0, 0.1]},
    "num_trials": 7,
    "searcher": {"type": "tpe", "startup_trials": 3},
    "scheduler": {"type": "asha", "grace_period": 4, "reduction_factor": 3},
    "max_concurrent_trials": 1,
}


def facts(log: SweepLog) -> dict[str, Any]:
    """What must not depend on kills: values, figures and ends of every trial."""
    return {t.id: (t.values, t.reports, t.status) for t in log.trials.values()}


def ended(folder: SweepFolder) -> int:
    return sum(r["kind"] == "end" for r in read_records(folder.log))


@pytest.mark.timeout(600)
def test_killed_at_random_moments_a_sweep_decides_what_it_would_have_decided(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    whole = faults.LiveRun(job(models, tmp_path / "whole", "whole", ASHA), "sweep")
    folder = SweepFolder(tmp_path / "whole" / "runs" / "whole")
    assert whole.finish() == 0, whole.output()
    want = facts(open_log(folder))
    assert "pruned" in {status for _, _, status in want.values()}

    spec = job(models, tmp_path / "killed", "killed", ASHA)
    folder = SweepFolder(tmp_path / "killed" / "runs" / "killed")
    run = faults.LiveRun(spec, "sweep")
    run.wait_until(lambda: ended(folder) >= 1)
    run.kill_worker(0)
    target = 1 + random.Random().randrange(1, 3)
    run.wait_until(lambda: ended(folder) >= target)
    time.sleep(random.Random().random())  # anywhere between two things that are written
    run.kill_everything()
    before = ended(folder)
    left = {t.id: starts(folder, t.id) for t in open_log(folder).trials.values() if not t.status}
    committed_at = {trial: newest_step(folder, trial) for trial in left}
    again = faults.LiveRun(spec, "sweep")
    if before < len(want) - 2:
        again.wait_until(lambda: ended(folder) > before)
        lost = again.processes("TrialProxy")
        assert lost, "nobody follows the trials"
        for process in lost:
            process.kill()
    assert again.finish() == 0, again.output()
    log = open_log(folder)
    got = facts(log)
    assert got.keys() == want.keys()
    for trial in want:
        assert got[trial] == want[trial], trial
    ran = [r["trial"] for r in read_records(folder.log) if r["kind"] == "end"]
    assert sorted(ran) == sorted(set(ran)), "a finished trial ran again"
    assert read_json(folder.outcome)["status"] == "finished"
    for trial, earlier in left.items():
        went_on_at = starts(folder, trial)[len(earlier) :]
        assert went_on_at[:1] in ([], [committed_at[trial]]), "from its newest checkpoint"


def starts(folder: SweepFolder, trial: str) -> list[int]:
    """The step of each start of a trial."""
    events = read_records(folder.trial(trial).events)
    return [e["step"] for e in events if e["kind"] == "stream"]


def newest_step(folder: SweepFolder, trial: str) -> int:
    """The step that a trial must go on from."""
    found = newest_valid(folder.trial(trial).checkpoints, lambda _: None)
    return found.step if found else 0


@pytest.mark.timeout(400)
def test_a_sweep_that_is_asked_to_stop_keeps_everything_and_goes_on_by_name(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    search = {
        "space": {"optimizer.lr": lr()},
        "num_trials": 30,
        "scheduler": {"type": "none"},
        "budget": {"patience_trials": 3},
        "max_concurrent_trials": 1,
    }
    spec = job(models, tmp_path, "asked", search, stop={"max_steps": 100})
    folder = SweepFolder(tmp_path / "runs" / "asked")
    run = faults.LiveRun(spec, "sweep")
    run.wait_until(lambda: bool(read_steps(folder.trial("t00001").steps)))
    run.signal(signal.SIGINT)
    assert run.finish() == 130, run.output()
    assert "the same command goes on" in run.output()
    assert (read_json(folder.outcome)["status"], ended(folder)) == ("stopped", 1)
    again = faults.LiveRun(spec, "sweep")
    assert again.finish() == 0, again.output()
    outcome = read_json(folder.outcome)
    assert outcome["status"] == "budget"
    assert "has not improved for 3 trials" in outcome["message"]
    assert folder.export.exists()
    streams = [e for e in read_records(folder.trial("t00001").events) if e["kind"] == "stream"]
    assert [e["step"] > 0 for e in streams] == [False, True], "the stopped trial began anew"
    with_checkpoints = [p.parent.name for p in (folder.root / "trials").glob("*/checkpoints")]
    assert with_checkpoints
    for trial in with_checkpoints:
        valid = newest_valid(folder.trial(trial).checkpoints, lambda _: None)
        assert valid == committed(folder.trial(trial).checkpoints)[0], "every checkpoint is valid"
