"""The report: what it shows of a run, whatever state the run is in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.drawing import MOST_POINTS, smoothed, thinned
from orchestrator.report.figures import loss_chart
from orchestrator.report.html import headline, write_report
from orchestrator.report.records import RecordWriter, append_event
from orchestrator.report.run import best_eval, read_run
from orchestrator.report.text import bytes_text, duration
from orchestrator.report.timeline import starts, time_spent, timeline
from orchestrator.run_folder import RunFolder, write_atomically, write_json

PLAN: dict[str, Any] = {
    "spec": {"name": "run", "evaluation": {"metric": None}, "gradient_clipping": 1.0},
    "cluster": {"source": "this machine", "nodes": [{"cpus": 2.0, "gpus": 0.0}]},
    "model": {"model_type": "bert", "parameters": 22_713_986, "trainable": 22_713_986},
    "labels": ["neg", "pos"],
    "train_data": {
        "rows": 640, "tokens": 9000, "longest_tokens": 42, "truncated_rows": 3, "bad_rows": 0
    },
    "eval_data": None,
    "num_workers": 2,
    "bf16": False,
    "stage": 1,
    "global_batch_size": 32,
    "total_steps": 20,
    "eval_every_steps": 10,
    "checkpoint_every_steps": 5,
    "checkpoint_bytes": 3 * 2**20,
    "memory_bytes": {"parameters": 2**30, "runtime": 2**29, "logits": 0},
    "memory_limit_bytes": 4 * 2**30,
    "deepspeed": {"train_batch_size": 32},
    "reasons": {"bf16": "CPU workers: fp32 is exact", "global_batch_size": "default: 32"},
    "warnings": ["train: 3 of 640 rows were cut to 42 tokens"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def step(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": number, "time": 1000.0 + number, "loss": 1.0 / number, "lr": 1e-4, "grad_norm": 0.5,
        "tokens": 400, "rows": 32, "step_s": 0.5, "wait_s": 0.125, "memory_bytes": 2**30,
    }  # fmt: skip
    return record | changes


def evaluation(number: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    confusion = [[8, 2], [1, 9]]
    record = {"step": number, "eval_s": 2.0, "loss": 0.4, "accuracy": accuracy, "rows": 20}
    return record | {"f1_per_class": {"neg": 0.8, "pos": 0.9}, "confusion": confusion} | changes


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    writer = RecordWriter(path)
    for record in records:
        writer.write(**record)
    writer.flush()


def write_events(folder: RunFolder, *events: tuple[float, str, dict[str, Any]]) -> None:
    for when, kind, facts in events:
        append_event(folder.events, kind, **({"time": when} | facts))


def write_run(folder: RunFolder, plan: dict[str, Any] | None = None) -> None:
    """Twenty steps and two evaluations, the first of which is the best."""
    write_json(folder.plan, PLAN | (plan or {}))
    write_records(folder.steps, [step(n) for n in range(1, 21)])
    evals = [evaluation(10, 0.875, time=1010.5), evaluation(20, 0.85, time=1020.5)]
    write_records(folder.evals, evals)
    outcome = {"status": "finished", "step": 20, "best": evaluation(10, 0.875), "message": ""}
    facts = {"peak_memory_bytes": 3 * 2**29, "elapsed_s": 75.0}
    write_json(folder.outcome, outcome | {"facts": facts})


def page_of(folder: RunFolder) -> str:
    assert write_report(folder) == folder.report
    return folder.report.read_text(encoding="utf-8")


def charts_of(page: str) -> dict[str, Any]:
    """Chart name → figure, read as strictly as a browser reads JSON."""
    found = re.findall(r'<script type="application/json" data-chart="(.+?)">(.+?)</script>', page)
    return {name: json.loads(text, parse_constant=pytest.fail) for name, text in found}


def words_of(page: str) -> str:
    """The text a reader sees, spaces joined."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in figure["data"] if t["name"] == name)


def test_a_plateau_is_told_from_a_rate_that_went_wrong(folder: RunFolder) -> None:
    for kind, says in (
        ("plateau", "Lowered by the plateau rule at step 11"),
        ("constant", "differ at"),
    ):
        schedule = {"spec": PLAN["spec"] | {"schedule": {"type": kind}}}
        write_run(folder, schedule | {"planned_rates": [(n, 1e-4) for n in range(1, 21)]})
        folder.steps.unlink()
        write_records(folder.steps, [step(n, lr=1e-4 if n < 11 else 5e-5) for n in range(1, 21)])
        assert says in words_of(page_of(folder)), kind


def test_headline_shows_result_and_baseline(folder: RunFolder) -> None:
    write_run(folder)
    baseline = {"name": "frozen features", "train_rows": 4498, "seconds": 12.3}
    write_json(folder.baseline, baseline | {"metrics": {"accuracy": 0.75}})
    words = words_of(page_of(folder))
    assert "run Finished step 20 of 20" in words
    assert "best accuracy 0.8750 at step 10" in words
    assert "baseline accuracy 0.7500 frozen features, 4,498 rows, 12.3 s" in words
    assert "against the baseline +0.1250 better" in words


@pytest.mark.parametrize(("baseline", "decision"), [(0.5, "better"), (0.3, "worse")])
def test_a_lower_loss_is_called_better(folder: RunFolder, baseline: float, decision: str) -> None:
    write_run(folder, {"spec": {"evaluation": {"metric": "loss"}}})
    write_json(folder.baseline, {"name": "b", "metrics": {"loss": baseline}})
    shown = {figure.label: figure for figure in headline(read_run(folder))}
    assert shown["against the baseline"].detail == decision


def test_best_evaluation_is_found_while_the_run_has_no_outcome(folder: RunFolder) -> None:
    write_run(folder)
    folder.outcome.unlink()
    name, best = best_eval(read_run(folder))
    assert (name, best and best["step"]) == ("accuracy", 10)
    assert "No result yet" in words_of(page_of(folder))


def test_message_of_a_failed_run_is_shown(folder: RunFolder) -> None:
    write_run(folder)
    message = "training diverged at step 7: loss nan. Lower optimizer.lr."
    write_json(folder.outcome, {"status": "diverged", "step": 6, "best": None, "message": message})
    words = words_of(page_of(folder))
    assert "run Diverged step 6 of 20" in words
    assert message in words


def test_report_escapes_what_users_wrote(folder: RunFolder) -> None:
    evil = "</script><script>alert(1)</script>"
    reasons = {"stage": evil}
    write_run(folder, {"labels": [evil, "<img src=x>"], "warnings": [evil], "reasons": reasons})
    write_atomically(folder.spec, f"name: run  # {evil}\n")
    write_events(folder, (1001.0, "warning", {"text": evil}), (1002.0, evil, {"why": evil}))
    write_records(folder.evals, [evaluation(20, 0.9, f1_per_class={evil: 0.5}, **{evil: 0.7})])
    page = page_of(folder)
    assert evil not in page
    assert "<img src=x>" not in page
    assert "name: run  # &lt;/script&gt;" in page
    assert charts_of(page)["confusion"]["layout"]["yaxis"]["ticktext"][1] == "&lt;img src=x&gt;"


def test_report_needs_no_network(folder: RunFolder) -> None:
    write_run(folder)
    page = page_of(folder)
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert "default-src 'none'" in page


def test_report_of_a_run_that_never_stepped_still_renders(folder: RunFolder) -> None:
    write_json(folder.plan, PLAN)
    words = words_of(page_of(folder))
    assert "Not started" in words
    assert "Nothing to draw: no step was recorded yet." in words
    assert "optimizer steps 20 0 0.00" in words


def test_report_of_an_empty_folder_still_renders(folder: RunFolder) -> None:
    page = page_of(folder)
    assert charts_of(page) == {}
    assert "No event was recorded." in words_of(page)


def test_a_file_that_cannot_be_read_is_named(folder: RunFolder) -> None:
    write_run(folder)
    folder.plan.write_text('{"torn": ', encoding="utf-8")
    assert "plan.json cannot be read" in words_of(page_of(folder))


def test_values_that_are_missing_or_not_finite_become_gaps(folder: RunFolder) -> None:
    nan = float("nan")
    broken = [step(1), step(2, loss=nan, grad_norm=None), step(3, loss=float("inf")), {"step": 4}]
    write_json(folder.plan, PLAN)
    write_records(folder.steps, broken)
    write_records(folder.evals, [evaluation(4, nan, loss=None, confusion=None)])
    charts = charts_of(page_of(folder))
    assert trace(charts["loss"], "train")["y"] == [1.0, None, None, None]
    assert trace(charts["norm"], "norm")["y"] == [0.5, None, 0.5, None]
    assert "confusion" not in charts


def test_replayed_steps_are_drawn_once(folder: RunFolder) -> None:
    write_json(folder.plan, PLAN)
    again = [step(n, loss=9.0, time=1100.0 + n) for n in range(6, 11)]
    write_records(folder.steps, [*(step(n) for n in range(1, 9)), *again])
    drawn = trace(charts_of(page_of(folder))["loss"], "train")
    assert drawn["x"] == list(range(1, 11))
    assert drawn["y"][5:] == [9.0] * 5


def write_restarted(folder: RunFolder) -> None:
    """Steps 1 to 8, a lost worker, and on from the checkpoint of step 5."""
    write_json(folder.plan, PLAN)
    again = [step(n, time=1100.0 + n) for n in range(6, 11)]
    write_records(folder.steps, [*(step(n) for n in range(1, 9)), *again])
    write_events(
        folder,
        (990.0, "launch", {"workers": 2}),
        (992.0, "imports", {}),
        (994.0, "model", {"attempt": "a"}),
        (995.0, "stream", {"step": 0}),
        (1001.0, "first_step", {"step": 1}),
        (1005.0, "save", {"step": 5, "stall_s": 0.25}),
        (1005.5, "commit", {"step": 5, "folder": "step-00000005-a"}),
        (1008.5, "save", {"step": 8, "stall_s": 0.25}),
        (1012.0, "imports", {}),
        (1014.0, "model", {"attempt": "b"}),
        (1018.0, "stream", {"step": 5}),
        (1106.0, "first_step", {"step": 6}),
        (1107.0, "warning", {"text": "a disk is nearly full"}),
    )  # fmt: skip


def test_timeline_tells_what_a_restart_cost(folder: RunFolder) -> None:
    write_restarted(folder)
    rows = {row.what: row.detail for row in timeline(read_run(folder))}
    assert rows["Started"].startswith("from step 0, first step after 11.0 s (imports 2.0 s, model")
    cost = "from step 5, 3 steps done again, first step after 1 min 38 s"
    assert rows["Restart 1"].startswith(cost)
    assert rows["Checkpoint of step 5"] == "step-00000005-a, training stood still for 250 ms"
    assert rows["Checkpoint of step 8"] == "written, never committed"
    assert rows["Warning"] == "a disk is nearly full"
    assert "1970-01-01 00:16:45" in page_of(folder)


def test_a_second_launch_is_not_called_a_restart(folder: RunFolder) -> None:
    write_restarted(folder)
    write_events(folder, (1200.0, "launch", {}), (1202.0, "imports", {}))
    write_events(folder, (1203.0, "stream", {"step": 10}))
    what = [row.what for row in timeline(read_run(folder))]
    assert what[-1] == "Launched again"
    assert what.count("Restart 1") == 1
    assert [start.launched for start in starts(read_run(folder))] == [True, False, True]


def test_time_spent_counts_lost_steps_apart(folder: RunFolder) -> None:
    write_restarted(folder)
    write_records(folder.evals, [evaluation(10, 0.9)])
    spent = dict(time_spent(read_run(folder)))
    assert spent["training"] == pytest.approx(10 * 0.375)
    assert spent["waiting for data"] == pytest.approx(10 * 0.125)
    assert spent["steps done again"] == pytest.approx(3 * 0.5)
    assert spent["starting up"] == pytest.approx((995 - 990) + (1018 - 1008))
    assert (spent["evaluation"], spent["saving checkpoints"]) == (2.0, 0.5)


def test_throughput_marks_restarts_and_checkpoints(folder: RunFolder) -> None:
    write_restarted(folder)
    figure = charts_of(page_of(folder))["throughput"]
    assert trace(figure, "tokens/s")["y"][0] == 800.0
    marks = [(shape["name"], shape["x0"]) for shape in figure["layout"]["shapes"]]
    assert marks == [("checkpoint", 5), ("restart", 5)]


def test_confusion_matrix_carries_the_labels_of_the_plan(folder: RunFolder) -> None:
    write_run(folder)
    figure = charts_of(page_of(folder))["confusion"]
    assert figure["layout"]["xaxis"]["ticktext"] == ["neg", "pos"]
    assert figure["data"][0]["text"] == [[8, 2], [1, 9]]
    assert figure["data"][0]["z"] == [[0.8, 0.2], [0.1, 0.9]]


def test_several_labels_per_row_have_a_confusion_picture_too(folder: RunFolder) -> None:
    write_run(folder)
    by_label = {"good": [[7, 1], [2, 10]], "long": [[0, 0], [5, 15]]}
    best = {k: v for k, v in evaluation(10, 0.9).items() if k != "confusion"}
    best["confusion_per_label"] = by_label
    write_json(folder.outcome, {"status": "finished", "best": best})
    figure = charts_of(page_of(folder))["confusion"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["good", "not good", "long", "not long"]
    assert figure["layout"]["xaxis"]["ticktext"] == ["predicted", "not predicted"]
    assert figure["data"][0]["text"] == [[7, 1], [2, 10], [0, 0], [5, 15]]
    assert figure["data"][0]["z"][0] == [0.875, 0.125]
    assert figure["data"][0]["z"][2] == [0, 0]


def test_scores_of_each_label_stand_side_by_side_the_weakest_first(folder: RunFolder) -> None:
    scores = {
        "precision_per_class": {"neg": 0.7, "pos": 1.0},
        "f1_per_class": {"pos": 0.9, "neg": 0.8},
    }
    write_run(folder)
    write_json(folder.outcome, {"status": "finished", "best": evaluation(10, 0.9, **scores)})
    figure = charts_of(page_of(folder))["per-label"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["neg", "pos"]
    assert trace(figure, "f1")["x"] == [0.8, 0.9]
    assert trace(figure, "precision")["x"] == [0.7, 1.0]
    assert len(figure["data"]) == 2


def test_what_the_model_wrote_stands_beside_the_reference(folder: RunFolder) -> None:
    write_run(folder)
    assert "What the model wrote" not in words_of(page_of(folder))
    texts = [{"reference": "<b>a cat</b>", "written": "the cat"}]
    write_json(folder.outcome, {"status": "finished", "best": evaluation(10, 0.9, examples=texts)})
    page = page_of(folder)
    assert "&lt;b&gt;a cat&lt;/b&gt; the cat" in words_of(page)
    assert "<b>a cat" not in page


def test_every_scalar_metric_is_drawn(folder: RunFolder) -> None:
    write_json(folder.plan, PLAN)
    write_records(folder.steps, [step(1)])
    same = {"loss": 2.0, "token_accuracy": 0.4, "f1_macro": 0.3, "rows": 5}
    write_records(folder.evals, [{"step": n, "perplexity": 7.4 - n, **same} for n in (1, 2)])
    charts = charts_of(page_of(folder))
    assert {t["name"] for t in charts["metrics"]["data"]} == {"token_accuracy", "f1_macro"}
    assert charts["metric-perplexity"]["data"][0]["y"] == [6.4, 5.4]
    assert trace(charts["loss"], "evaluation")["y"] == [2.0, 2.0]


def test_prediction_stands_beside_measurement(folder: RunFolder) -> None:
    write_run(folder)
    checkpoint = folder.checkpoints / "step-00000020-a"
    write_json(checkpoint / "COMMIT.json", {})
    (checkpoint / "shard.pt").write_bytes(bytes(3 * 2**20))
    (folder.checkpoints / "step-00000025-a").mkdir()
    page = page_of(folder)
    words = words_of(page)
    assert "peak memory of a worker 1.50 GiB 1.50 GiB 1.00" in words
    assert "one checkpoint on disk 3 MiB 3 MiB 1.00" in words
    assert "optimizer steps 20 20 1.00" in words
    assert "Checkpoint measured: step-00000020-a" in words
    assert trace(charts_of(page)["memory"], "predicted peak")["y"] == [1.5, 1.5]


def test_plan_is_shown_with_its_reasons(folder: RunFolder) -> None:
    write_run(folder)
    words = words_of(page_of(folder))
    assert "precision fp32 CPU workers: fp32 is exact" in words
    assert "rows per step 32 default: 32" in words
    assert "workers 2 set in the job file" in words
    assert "train: 3 of 640 rows were cut to 42 tokens" in words


def test_long_lines_keep_their_spikes() -> None:
    y: list[float | None] = [0.0] * 50_000
    y[31_234] = 5.0
    y[40_000] = None
    thin_x, thin_y = thinned(list(range(50_000)), y)
    assert len(thin_x) <= MOST_POINTS + 2
    assert thin_x == sorted(thin_x)
    assert dict(zip(thin_x, thin_y, strict=True))[31_234] == 5.0


def test_smoothing_leaves_gaps_out_of_the_mean() -> None:
    assert smoothed([1.0, None, 3.0, None, 5.0])[2] == 3.0
    assert smoothed([None, None]) == [None, None]
    assert smoothed([]) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.042, "42 ms"),
        (3.14, "3.1 s"),
        (723, "12 min 3 s"),
        (7500, "2 h 5 min"),
        (None, "–"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_bytes_read_in_the_unit_that_suits_them() -> None:
    shown = [bytes_text(n) for n in (12, 2**20, 3 * 2**29, None)]
    assert shown == ["12 B", "1 MiB", "1.50 GiB", "–"]


def test_importing_the_report_loads_nothing_heavy() -> None:
    heavy = "{'plotly', 'jinja2', 'torch', 'ray'}"
    code = f"import sys, orchestrator.report.html; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_page_says_what_the_job_set_what_it_left_open_and_what_followed(
    folder: RunFolder,
) -> None:
    why = "Devlin et al."
    plan = {
        "model": {**PLAN["model"], "layers": 2, "adapted_modules": ["query", "value"]},
        "settings": [{"field": "tuning.r", "value": "4", "why": "Rank of the update"}],
        "defaults": [{"field": "optimizer.lr", "value": "5e-05", "why": why}],
        "learning_rate": 5e-5,
        "part_rates": [(1e-5, 1200), (5e-5, 34)],
        "unfreezing": [(1, 0), (11, 1), (21, 3)],
    }
    write_run(folder, plan)
    words = words_of(page_of(folder))
    assert "tuning.r 4 set by the job: Rank of the update" in words
    assert "optimizer.lr 5e-05 default, because: Devlin et al." in words
    assert "peak learning rate 5e-05 1e-05 for 1,200 parameters, 5e-05 for 34 parameters" in words
    assert "from step 1 the head, from step 11 the last 1, from step 21 all" in words
    assert "adapters on query, value" in words


def test_a_run_that_ended_early_says_so_and_why(folder: RunFolder) -> None:
    write_run(folder)
    outcome = {"status": "finished", "step": 8, "message": "stopped early at step 8 of 20: enough"}
    write_json(folder.outcome, outcome)
    assert "run Finished early step 8 of 20" in words_of(page_of(folder))
    assert "stopped early at step 8 of 20: enough" in words_of(page_of(folder))


def test_the_loss_chart_shows_the_tasks_own_loss_where_it_differs() -> None:
    steps = [step(n, task_loss=0.5 / n) for n in (1, 2, 3)]
    chart = loss_chart(steps, [])
    assert chart is not None
    assert [t["name"] for t in chart.figure["data"]][-1].startswith("train, the task alone")
    assert len(loss_chart([step(n) for n in (1, 2, 3)], []).figure["data"]) == 2  # type: ignore[union-attr]
