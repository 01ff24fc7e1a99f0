"""The verbs as users call them, on one small run: stopped, gone on, looked at, started over."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import orchestrator
from orchestrator.cli import app, options
from orchestrator.errors import OrchestratorError
from orchestrator.run_folder import RunFolder, read_json

ROOT = Path(__file__).parent.parent
STEPS, ROWS = 4, 40


@pytest.fixture(scope="module")
def home(ray: Any, models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all that follows, with a job whose paths are relative to it.

    Its adapter stays apart from the model, so that whoever loads the export needs the base as well.
    """
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").symlink_to(models.bert)
    tiny.write_jsonl(folder / "train.jsonl", tiny.labeled(ROWS))
    tiny.write_jsonl(folder / "eval.jsonl", tiny.labeled(9, seed=1))
    tiny.write_jsonl(folder / "new.jsonl", tiny.labeled(31, seed=2))
    job = {
        "name": "tiny",
        "task": {"type": "text_classification"},
        "model": {"pretrained": "model"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "tuning": {"type": "lora", "merge_on_export": False},
        "batch": {"global_batch_size": 8},
        "stop": {"max_steps": STEPS},
        "evaluation": {"every_steps": "end", "baseline_rows": 20},
        "resources": {"num_workers": 2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def call(*words: str, stdin: str | None = None, status: int = 0) -> Result:
    """Run `orchestrator WORDS…` in this process."""
    result = CliRunner().invoke(app, list(words), input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def early(home: Path) -> dict[str, Any]:
    """What `predict` leaves of a run that ended after its first step, for want of time."""
    call("prepare", "job.yaml")
    call("train", "job.yaml", "stop.max_time_s=0.001")
    folder = RunFolder(home / "runs" / "tiny")
    assert read_json(folder.outcome)["step"] < STEPS
    call("predict", "tiny", stdin="the film was great\n")
    return read_json(folder.export / "orchestrator.json")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(home: Path, early: dict[str, Any]) -> RunFolder:
    """The same run, gone on to its end."""
    call("train", "job.yaml")
    return RunFolder(home / "runs" / "tiny")


def test_a_run_that_goes_on_exports_its_last_weights_and_not_those_of_its_pause(
    early: dict[str, Any], run: RunFolder
) -> None:
    assert early["step"] < STEPS
    assert read_json(run.outcome)["status"] == "finished"
    assert read_json(run.export / "orchestrator.json")["last_eval"]["step"] == STEPS


def test_prepare_finds_what_is_ready(run: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("prepared").rglob("*")}
    text = call("prepare", "job.yaml").stdout
    assert f"train ready: {ROWS} rows" in text
    assert "eval ready: 9 rows" in text
    assert {path: path.stat().st_mtime_ns for path in Path("prepared").rglob("*")} == before


def test_plan_shows_what_train_ran(run: RunFolder) -> None:
    text = call("plan", "job.yaml").stdout
    for words in ("total steps", "ZeRO stage", "memory per worker", "DeepSpeed"):
        assert words in text
    shown = json.loads(call("plan", "job.yaml", "--json").stdout)
    ran = read_json(run.plan)
    for changing in ("cluster", "memory_limit_bytes", "reasons"):
        shown.pop(changing), ran.pop(changing)
    assert shown == ran


def test_eval_counts_every_row_once_and_finds_the_jobs_files(run: RunFolder) -> None:
    metrics = json.loads(call("eval", "tiny", "--data", "new.jsonl").stdout)
    assert metrics["rows"] == 31
    assert read_json(run.root / "eval" / "metrics.json") == metrics


def test_predict_answers_line_by_line_blank_ones_too(run: RunFolder) -> None:
    lines = ["the film was great", "", "my lunch was dull"]
    answers = [
        json.loads(a) for a in call("predict", "tiny", stdin="\n".join(lines)).stdout.splitlines()
    ]
    alone = [json.loads(call("predict", "tiny", stdin=line).stdout) for line in lines if line]
    assert answers[1] is None
    assert [answers[0]["label"], answers[2]["label"]] == [a["label"] for a in alone]


def test_export_copies_the_model_with_its_card_and_overwrites_nothing(run: RunFolder) -> None:
    call("export", "tiny", "model-out")
    card = Path("model-out/README.md").read_text(encoding="utf-8")
    assert "Held-out figures (9 rows)" in card
    assert "Baseline (frozen model + logistic regression, 20 training rows)" in card
    with pytest.raises(OrchestratorError, match="not empty"):
        call("export", "tiny", "model-out")


def test_runs_and_report_show_the_run(run: RunFolder) -> None:
    row = next(line for line in call("runs").stdout.splitlines() if "tiny" in line)
    assert f"{STEPS}/{STEPS}" in row
    run.report.unlink()
    call("report", "tiny")
    assert "logistic regression" in run.report.read_text(encoding="utf-8")


def test_tensorboard_has_every_step(run: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [s.step for s in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert STEPS in [s.step for s in board.Scalars("eval/accuracy")]


def test_python_users_call_the_same_verbs(run: RunFolder) -> None:
    """README's lines, with this job; packages called like verbs have been imported long since."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    found: dict[str, Any] = {}
    exec(
        block.replace("jobs/quickstart.yaml", "job.yaml").replace("optimizer.lr=3e-5", "seed=42"),
        found,
    )
    assert found["outcome"].status == "finished"
    assert found["outcome"].folder == run
    for name in orchestrator.__all__:
        assert callable(getattr(orchestrator, name)), name


def test_every_function_is_documented_with_its_arguments() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in orchestrator.__all__:
        one = getattr(orchestrator, name)
        if inspect.isclass(one):
            assert f"`{name}`" in page, name
        else:
            parts = inspect.signature(one).parameters.values()
            words = [p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parts]
            assert f"`{name}({', '.join(words)})`".replace("'", '"') in page, name


def test_doctor_says_what_is_here_and_what_is_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.launch import doctor

    found = {f.what: f for f in doctor.examine(home)}
    assert found["torch"].found.startswith("2.")
    assert "GiB free" in found[f"disk at {home}"].found
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else version(name))
    text = call("doctor", status=1).stdout
    assert re.search(r"problem\s+torch\s+not installed\s+pip install torch", text)


def test_fresh_starts_over_and_keeps_the_old_folder(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read_json(run.outcome)
    begun: list[bool] = []

    def launch(plan: Any, folder: RunFolder, console: Any) -> dict[str, Any]:
        begun.append(folder.checkpoints.exists())
        return {**old, "status": "stopped", "message": "asked to", "best": None}

    monkeypatch.setattr("orchestrator.launch.run.launch", launch)
    assert "asked to" in call("train", "job.yaml", "--fresh", "seed=1", status=130).stdout
    assert begun == [False], "nothing of the old run is left in its place"
    (kept,) = run.root.parent.glob("tiny.before-*")
    assert read_json(RunFolder(kept).outcome) == old
    assert any(RunFolder(kept).checkpoints.iterdir())


def test_storage_on_the_command_line_is_where_the_run_goes(home: Path) -> None:
    (home / "elsewhere").write_text("no folder")
    with pytest.raises(OrchestratorError, match="elsewhere/tiny cannot be written"):
        call("train", "job.yaml", "--storage-path", "elsewhere")


def test_tables_in_a_pipe_are_not_cut_at_eighty_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("COLUMNS", raising=False)
    assert options._width(io.StringIO()) == options.LOG_WIDTH
    assert options._width(Screen()) is None, "a screen says how wide it is"
    monkeypatch.setenv("COLUMNS", "60")
    assert options._width(io.StringIO()) is None, "and so may a user"


def test_deepspeed_says_nothing_among_what_a_verb_prints() -> None:
    code = (
        "from orchestrator.cli.options import quiet_libraries; quiet_libraries(); "
        "from deepspeed.utils import logger; logger.warning('no GPU'); logger.error('broken')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no GPU" not in said.stdout
    assert "broken" in said.stdout


# --- inputs and terminals that nobody meant


PLAIN = """
name: job
task: {type: causal_lm, packing: false}
model: {pretrained: org/model}
data: {train: "memory://x.jsonl"}
"""


def command(*words: str, cwd: Path, stdin: str = "", **environment: str) -> Any:
    """Run `orchestrator WORDS…` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=cwd, input=stdin.encode(), capture_output=True,
        env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("check", "missing.yaml"), 2),
        (("check", "."), 2),
        (("check", sys.executable), 2),
        (("check", "[/]"), 2),
        (("check", "job.yaml", "no override"), 2),
        (("check", "job.yaml", 'data.train="a\\0b"'), 2),
        (("check", "job.yaml", "name=[/bold]"), 2),
        (("plan", "."), 2),
        (("train", "missing.yaml"), 2),
        (("sweep", "missing.yaml"), 1),
        (("train", "missing", "--best"), 1),
        (("results", "[bold]"), 1),
        (("predict", "missing"), 1),
        (("report", "\x1b[31m"), 1),
        (("export", "missing", "there"), 1),
        (("runs", "--storage-path", "job.yaml"), 0),
        (("render", "."), 2),
        (("render",), 1),
        (("--[/]",), 2),
        (("no-such-verb",), 2),
    ],
)
def test_wrong_arguments_end_in_a_sentence(
    words: tuple[str, ...], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert verb(*words) == status


def verb(*words: str) -> int:
    """Run a verb as `main` does and return its exit status; an error that `main` does not expect is raised."""
    import orchestrator.cli as cli

    before = sys.argv
    sys.argv = ["orchestrator", *words]
    try:
        return cli._run()
    finally:
        sys.argv = before


WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "job.yaml",
            ".",
            "a=1",
            "--json",
            "--storage-path",
            "--cluster",
            "--",
            "-h",
            "[/]",
            "\0",
            "x=\0",
            "\ud800",
        ]
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(
        ["check", "results", "report", "runs", "render", "export", "schema", "jobs-"]
    ),
    words=st.lists(WORDS, max_size=4),
)
def test_no_arguments_end_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    (tmp_path / "job.yaml").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert verb(name, *words) in (0, 1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"COLUMNS": "20"},
        {"COLUMNS": "1"},
        {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"},
    ],
)
def test_a_poor_terminal_changes_no_exit_status(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "runs" / "größe-→").mkdir(parents=True)
    (tmp_path / "runs" / "größe-→" / "job.yaml").write_text("x")
    for words, status in (
        (("runs",), 0),
        (("check", "ö…→.yaml"), 2),
    ):
        done = command(*words, cwd=tmp_path, **environment)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr


def test_closed_streams_and_readers_who_leave(tmp_path: Path) -> None:
    shell = f"{shlex.quote(sys.executable)} -m orchestrator"
    for script, status in (
        (f"{shell} schema | head -1", 0),
        (f"{shell} schema >&-", 0),
        (f"{shell} check missing.yaml 2>&-", 2),
        (f"{shell} predict missing <&-", 1),
        (f"{shell} schema > /dev/full", 1),
    ):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, (script, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("after_s", [0.1, 0.3, 0.6, 1.5])
def test_ctrl_c_at_any_time_of_the_start_is_one_word(after_s: float, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(PLAIN)
    code = (
        "import sys, orchestrator.cli as cli; print('up', flush=True); "
        "sys.argv[1:] = ['plan', 'job.yaml']; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert process.returncode == 130 or (after_s > 1 and process.returncode == 1), (
        "it may have ended"
    )


def test_check_is_fast_because_it_imports_little(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(PLAIN)
    code = (
        "import sys, orchestrator.cli as cli; sys.argv[1:] = ['check', 'job.yaml']\n"
        "try: cli.main()\nfinally: print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {
        "torch",
        "ray",
        "transformers",
        "deepspeed",
        "datasets",
        "pandas",
        "pyarrow",
        "numpy",
        "peft",
    }
