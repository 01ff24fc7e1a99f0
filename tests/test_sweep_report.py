"""The report of a sweep: what it shows, whatever state the sweep is in."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import sweeps
from test_report import charts_of, trace, words_of
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import OrchestratorError
from orchestrator.metric import Metric
from orchestrator.report import importance as importance_module
from orchestrator.report.importance import FEWEST_TRIALS, importance
from orchestrator.report.lineage import lineage_chart
from orchestrator.report.slot_time import (
    busy_s,
    capacity_s,
    idle,
    launches,
    running_s,
    slot_shares,
    spans,
)
from orchestrator.report.space_figures import (
    NOT_SET,
    field_charts,
    parallel_chart,
)
from orchestrator.report.sweep_figures import best_chart, curves_chart, slots_chart
from orchestrator.report.sweep_html import comparisons, saved_steps, write_sweep_report
from orchestrator.report.sweep_stats import read_sweep
from orchestrator.report.trial_log import Decision, SweepLog, open_log
from orchestrator.run_folder import (
    SweepFolder,
    find_run,
    find_sweep,
    read_json,
    write_atomically,
    write_json,
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """Sixty trials on four slots."""
    return sweeps.make_sweep(tmp_path_factory.mktemp("runs") / "many", 60).write()


def page_of(folder: SweepFolder) -> str:
    assert write_sweep_report(folder) == folder.report
    return folder.report.read_text(encoding="utf-8")


def test_a_large_sweep_is_shown_whole(many: SweepFolder) -> None:
    page, log = page_of(many), open_log(many)
    words, charts, best = words_of(page), charts_of(page), log.best()
    assert best is not None
    assert "many Finished 60 of 60 trials" in words
    assert f"best accuracy {best.best:.4f} trial {best.id}, step 45" in words
    failed = sum(t.status == "diverged" for t in log.trials.values())
    assert f"{failed} failed" in words
    assert all(f"{t.id}" in page for t in log.trials.values())
    assert "ValueError: loss is nan at step 3" in words
    assert "name: many-best" in words
    assert {"curves", "slots", "parallel", "importance", "best", "losses", "compute"} <= set(charts)
    assert {f"field-{path}" for path in sweeps.SPACE} <= set(charts)
    assert "lineage" not in charts


def test_every_trial_has_a_curve_and_rungs_are_marked(many: SweepFolder) -> None:
    sweep = read_sweep(many)
    chart = curves_chart(sweep)
    assert chart is not None
    data, layout = chart.figure["data"], chart.figure["layout"]
    drawn = {word.split(",")[0] for t in data for word in t.get("text", ()) if word}
    assert drawn == {t.id for t in sweep.trials if t.evals}
    assert [shape["x0"] for shape in layout["shapes"]] == [5, 15, 45]
    pruned = trace(chart.figure, "pruned")["x"]
    assert max(x for x in pruned if x is not None) < 45


def test_the_best_so_far_is_told_against_all_steps(many: SweepFolder) -> None:
    sweep, chart = read_sweep(many), best_chart(read_sweep(many))
    assert chart is not None
    y = chart.figure["data"][0]["y"]
    assert list(y) == sorted(y)
    assert y[-1] == sweep.best.state.best  # type: ignore[union-attr]
    assert chart.figure["data"][0]["x"][-1] == sweep.log.steps_total


def test_slots_time_adds_up_and_idle_time_shows(many: SweepFolder) -> None:
    sweep = read_sweep(many)
    runs = launches(sweep)
    taken = spans(sweep, runs)
    lost = idle(runs, taken)
    assert busy_s(taken) + sum(lost.values()) == pytest.approx(capacity_s(runs))
    assert lost["slots starting up"] == pytest.approx(4 * sweeps.STARTUP_S)
    assert lost["between trials"] == pytest.approx(sweeps.HANDOVER_S * (len(taken) - 4))
    shares = slot_shares(sweep, runs, taken)
    assert sum(s.seconds for s in shares) == pytest.approx(capacity_s(runs))
    chart = slots_chart(sweep, runs, taken)
    assert chart is not None
    assert {t["name"] for t in chart.figure["data"]} == {"idle", "finished", "pruned", "failed"}


def test_steps_saved_by_pruning_are_counted(tmp_path: Path) -> None:
    made = sweeps.Made(SweepFolder(tmp_path / "s"), (5, 15, 45), "asha", 1)
    made.trial(0, {"optimizer.lr": 1e-3})
    made.trial(1, {"optimizer.lr": 1e-5})
    sweep = read_sweep(made.write())
    assert [t.state.status for t in sweep.trials] == ["finished", "pruned"]
    assert saved_steps(sweep) == 40
    assert "optimizer steps 50 40 more (44%) saved by pruning" in words_of(page_of(made.folder))


def test_expected_trials_stand_beside_those_that_came(many: SweepFolder) -> None:
    sweep = read_sweep(many)
    found = {c.what: (c.predicted, c.measured) for c in comparisons(sweep)}
    reached = sum(len(t.evals) >= 2 for t in sweep.trials)
    assert found["trials that reached step 15"] == ("20", str(reached))
    assert found["trials"] == ("60", "60")


def test_a_sweep_under_way_shows_what_runs(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "live", 6, slots=2)
    made.trial(6, {"optimizer.lr": 1e-3}, until=9)
    sweep = read_sweep(made.write(status=None))
    runs = launches(sweep)
    taken = spans(sweep, runs)
    running = [s for s in taken if s.kind == "running"]
    assert [s.trial for s in running] == ["t00006"]
    last = sweep.trials[-1].attempts[-1][1]
    assert runs[-1].ended == last, "a launch without an end lasts until the last record"
    others = [s for s in taken if s.slot == running[0].slot and s is not running[0]]
    assert all(s.ended <= running[0].began or s.began >= running[0].ended for s in others)
    words = words_of(page_of(made.folder))
    assert "live No result yet" in words
    assert "it is running, or it was killed" in words
    assert "1 running" in words


def test_time_between_launches_does_not_count(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "again", 4, slots=2)
    killed_at = max(made.free.values())
    made.free = dict.fromkeys(made.free, killed_at + 10_000 + sweeps.STARTUP_S)
    made.trial(4, {"optimizer.lr": 1e-3})
    folder = made.write()
    again = {"time": killed_at + 10_000, "kind": "launch", "slots": 2}
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    sweeps.write_lines(folder.events, [events[0], again, *events[1:]])
    runs = launches(read_sweep(folder))
    assert len(runs) == 2
    assert runs[0].ended < killed_at
    ran = [run.ended - run.began for run in runs]
    assert running_s(runs, runs[1].began + 5) == pytest.approx(ran[0] + 5)
    chart = slots_chart(read_sweep(folder), runs, spans(read_sweep(folder), runs))
    assert chart is not None
    assert chart.figure["layout"]["xaxis"]["range"][1] == pytest.approx(sum(ran))
    assert [shape["x0"] for shape in chart.figure["layout"]["shapes"]] == [pytest.approx(ran[0])]
    words = words_of(page_of(folder))
    assert "1 resume" in words
    assert "2 h" not in words.split("Trials")[0]


def test_who_took_over_whom_is_drawn(tmp_path: Path) -> None:
    made = sweeps.make_population(tmp_path / "pbt")
    sweep = read_sweep(made.write(num_trials=8))
    chart = lineage_chart(sweep)
    assert chart is not None
    taken = trace(chart.figure, "took over another's checkpoint")
    rows = list(zip(taken["y"][0::4], taken["y"][2::4], strict=True))
    parents = [(t.state.parent, t.id) for t in sweep.trials if t.state.parent]
    expected = [(int(p[0][1:4]), int(i[1:4])) for p, i in parents if p[0][:4] != i[:4]]
    assert rows == expected
    assert len(expected) == 6
    line = [y for y in trace(chart.figure, "led to the best")["y"] if y is not None]
    assert line[-1] == int(sweep.best.id[1:4])  # type: ignore[union-attr]
    assert len(line) == 3 * 4, "one piece for each generation"
    words = words_of(page_of(made.folder))
    assert "32 of 32 trials" in words
    assert "24 generation ended · 8 finished" in words


def test_importance_names_the_field_that_matters(many: SweepFolder) -> None:
    found, words = importance(read_sweep(many))
    assert max(found, key=lambda p: found[p]) == "optimizer.lr"
    assert sum(found.values()) == pytest.approx(1)
    assert "fANOVA" in words
    assert "step 5" in words


def test_importance_is_not_that_of_survivors(
    many: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance_module, "FEWEST_TRIALS", 5)
    sweep = read_sweep(many)
    assert sum(15 in t.state.reports for t in sweep.trials) > 5
    assert "at step 5." in importance(sweep)[1]
    everyone = sweeps.make_sweep(many.root.parent / "all", 8, scheduler="none").write()
    assert "at step 45." in importance(read_sweep(everyone))[1]


def test_importance_of_too_few_trials_is_refused_in_words(tmp_path: Path) -> None:
    sweep = read_sweep(sweeps.make_sweep(tmp_path / "few", FEWEST_TRIALS - 1).write())
    found, words = importance(sweep)
    assert found == {}
    assert words.startswith(f"Not computed: it takes {FEWEST_TRIALS} trials")


def test_a_conditional_field_is_left_out_of_importance_and_shown_elsewhere(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "cond", 30, scheduler="none")
    for record in made.log:
        if record["kind"] == "trial" and record["index"] % 2:
            del record["values"]["schedule.warmup_ratio"]
    sweep = read_sweep(made.write())
    found, words = importance(sweep)
    assert "schedule.warmup_ratio" not in found
    assert "Left out, because not every trial has them: schedule.warmup_ratio" in words
    shown = {c.title: c for c in field_charts(sweep)}["schedule.warmup_ratio"]
    points = [x for t in shown.figure["data"] for x in t["x"] if t["name"] != "best"]
    with_it = [t for t in sweep.trials if t.state.best is not None and t.state.index % 2 == 0]
    assert len([x for x in points if x is not None]) == len(with_it)
    chart = parallel_chart(sweep)
    assert chart is not None
    places = {y for t in chart.figure["data"] for y in t["y"] if y is not None}
    assert NOT_SET in places
    assert all(-1e-9 <= y <= 1 + 1e-9 for y in places - {NOT_SET})


def test_an_empty_sweep_still_has_a_report(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "nothing")
    words = words_of(page_of(folder))
    assert "nothing Not started no trials" in words
    assert "No trial was proposed yet." in words
    assert charts_of(page_of(folder)) == {}


@pytest.mark.parametrize(
    "name", ["sweep.json", "trials.jsonl", "slots.jsonl", "events.jsonl", "outcome.json"]
)
def test_a_torn_or_missing_file_never_fails_the_report(tmp_path: Path, name: str) -> None:
    folder = sweeps.make_sweep(tmp_path / "torn", 3).write()
    whole = (folder.root / name).read_text(encoding="utf-8")
    (folder.root / name).write_text(whole[: len(whole) * 2 // 3], encoding="utf-8")
    write_sweep_report(folder)
    (folder.root / name).unlink()
    write_sweep_report(folder)


@pytest.mark.parametrize("seed", range(6))
def test_fields_that_are_missing_or_null_never_fail_the_report(tmp_path: Path, seed: int) -> None:
    rng, folder = random.Random(seed), sweeps.make_population(tmp_path / "s", 4, 3).write()
    for path in sorted(folder.root.rglob("*.json*")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        sweeps.write_lines(path, [damaged(json.loads(line), rng) for line in lines])
    write_sweep_report(folder)


def damaged(value: Any, rng: random.Random) -> Any:
    """A copy without some of its fields, and with others empty."""
    if isinstance(value, list):
        return [damaged(v, rng) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if rng.random() > 0.04}
    return {k: None if rng.random() < 0.03 else damaged(v, rng) for k, v in kept.items()}


def test_a_trial_that_never_began_is_listed_with_its_reason(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "refused", 2)
    facts = {"kind": "trial", "trial": "t00002", "index": 2, "values": {}, "parent": None}
    why = {"kind": "end", "trial": "t00002", "status": "failed", "step": 0, "message": "no room"}
    made.log += [{"time": made.free[0] + i, **record} for i, record in enumerate((facts, why))]
    words = words_of(page_of(made.write()))
    assert "1 failed" in words
    assert "t00002 failed 0 / 45" in words
    assert "t00002: failed no room" in words


def test_values_that_are_not_finite_become_gaps(tmp_path: Path) -> None:
    made = sweeps.make_sweep(tmp_path / "nan", 4)
    for record in made.log:
        if record["kind"] == "report" and record["trial"] == "t00001":
            record["metrics"]["accuracy"] = math.nan
    folder = made.write()
    for run in (folder.trial(f"t0000{i}") for i in range(4)):
        sweeps.write_lines(run.evals, [{"step": 5, "time": sweeps.START, "accuracy": math.inf}])
    charts_of(page_of(folder))
    assert open_log(folder).trials["t00001"].best is None


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    made = sweeps.make_sweep(tmp_path / "evil", 3)
    made.trial(3, {evil: evil, "optimizer.lr": 1e-3}, name=evil.replace("/", ""))
    made.trial(4, {"optimizer.lr": 1e-3}, end="failed", message=evil, until=3)
    spec = {"sweep": {"space": {**sweeps.SPACE, evil: [evil, "b"]}, "scheduler": {"type": "asha"}}}
    folder = made.write(spec=spec, warnings=[evil])
    write_atomically(folder.best, evil)
    page = page_of(folder)
    assert evil not in page
    assert "<script>alert" not in page
    assert not any("<script>" in json.dumps(chart) for chart in charts_of(page).values())


# --- the log


def test_a_log_read_back_says_what_was_written(tmp_path: Path) -> None:
    log = SweepLog(tmp_path / "trials.jsonl", Metric("loss", maximize=False))
    log.trial("a", 0, {"x": 1}, None)
    log.report("a", 5, 160.0, {"loss": 0.7}, Decision(True, True))
    log.report("a", 15, 480.0, {"loss": 0.9}, Decision(False, False))
    log.end("a", "pruned", 15)
    log.trial("b", 1, {"x": 2}, ("a", 5))
    log.report("b", 9, 288.0, {"loss": 0.6}, Decision(True, True))
    again = SweepLog(log.path, Metric("loss", maximize=False))
    assert again.trials == log.trials
    assert again.order == log.order
    assert again.trials["b"].parent == ("a", 5)
    assert [t.id for t in again.ranked()] == ["b", "a"]
    assert again.trials["a"].best == 0.7
    assert again.best() is again.trials["b"]
    assert again.steps_total == 15 + 4


def test_a_torn_last_line_is_passed_over_and_harms_no_later_one(tmp_path: Path) -> None:
    log = SweepLog(tmp_path / "trials.jsonl", Metric("loss", maximize=False))
    log.trial("a", 0, {}, None)
    with open(log.path, "a", encoding="utf-8") as handle:
        handle.write('{"time": 1.0, "kind": "report", "trial": "a", "st')
    before = log.path.read_bytes()
    again = SweepLog(log.path, Metric("loss", maximize=False))
    assert log.path.read_bytes() == before, "reading changes nothing"
    again.report("a", 5, 5.0, {"loss": 0.5}, Decision(True, False))
    assert SweepLog(log.path, Metric("loss", maximize=False)).trials["a"].reports == {
        5: {"loss": 0.5}
    }


def test_records_that_make_no_sense_are_counted_and_leave_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    good = {"kind": "trial", "trial": "a", "index": 0, "values": {}, "parent": None}
    report = {
        "kind": "report",
        "trial": "a",
        "step": 1,
        "key": 1.0,
        "metrics": 3,
        "go_on": True,
        "save": True,
    }
    unknown = report | {"trial": "b", "metrics": {}}
    sweeps.write_lines(path, [good, report, unknown, {"kind": "end"}])
    log = SweepLog(path, Metric("loss", maximize=False))
    assert log.unreadable == 3
    assert log.order == [("trial", "a", 0)]
    assert log.trials["a"].reports == {}


def test_what_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    log = SweepLog(tmp_path / "trials.jsonl", Metric("loss", maximize=False))
    log.trial("a", 0, {}, None)
    log.report("a", 1, 1.0, {"loss": math.nan}, Decision(True, False))
    log.report("a", 2, 2.0, {}, Decision(True, False))
    assert log.best() is None
    assert math.isnan(log.value(log.trials["a"], 2)), "a report without the metric"


# --- the command line


def call(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.output


def test_runs_report_and_results_know_sweeps(tmp_path: Path) -> None:
    folder = sweeps.make_sweep(tmp_path / "small", 3).write()
    assert "small" in call("runs", "--storage-path", tmp_path)
    assert "report.html" in call("report", "small", "--storage-path", tmp_path)
    assert folder.report.exists()
    lines = call("results", "small", "--storage-path", tmp_path).splitlines()
    first = next(line for line in lines if line.startswith("t0"))
    assert first.startswith(open_log(folder).ranked()[0].id)


@pytest.mark.parametrize("torn", ["plan.json", "sweep.json", "outcome.json", "job.yaml"])
def test_a_torn_run_or_sweep_is_listed_as_unreadable_beside_the_others(
    torn: str, tmp_path: Path
) -> None:
    good = sweeps.make_sweep(tmp_path / "good", 2).write()
    damaged = sweeps.make_sweep(tmp_path / "damaged", 2).write()
    if torn == "job.yaml":
        damaged.spec.unlink()
    else:
        (damaged.root / torn).write_text('{"spec": {"na')
    lines = call("runs", "--storage-path", tmp_path).splitlines()
    assert any("damaged" in line and "unreadable" in line for line in lines)
    assert any(good.name in line and "finished" in line for line in lines)


def test_a_sweep_that_is_taken_for_a_run_is_told_where_its_runs_are(tmp_path: Path) -> None:
    folder = sweeps.make_sweep(tmp_path / "small", 1).write()
    with pytest.raises(OrchestratorError, match="small is a sweep"):
        find_run("small", tmp_path)
    write_json(folder.trial("t00000").plan, read_json(folder.trial("t00000").plan))
    assert find_run(folder.trial("t00000").root).name == "t00000"
    with pytest.raises(OrchestratorError, match=r"t00000 is a training run.*orchestrator report"):
        find_sweep(folder.trial("t00000").root)
