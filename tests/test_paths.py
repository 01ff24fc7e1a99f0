"""Runs in folders whose names other programs read as patterns, escapes, comments or separators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from orchestrator.launch.run import train
from orchestrator.plan import Plan
from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, list_runs
from orchestrator.spec import apply_overrides, parse_spec
from orchestrator.train.checkpoint import committed
from orchestrator.train.export import export_run, load_exported, load_plan

NAMES = {
    0: "o'clock $HOME ~ ü 漢字",
    2: 'a [1-2] *? #%20 "q" & {b} ; | !',
    3: "[" * 10 + "x" * 200,
}
"""By ZeRO stage, since each finds and reads its files in another way."""


@pytest.mark.parametrize("stage", NAMES)
def test_a_run_in_a_folder_of_any_name_trains_exports_reports_and_resumes(
    stage: int, ray: Any, models: tiny.Tiny, tmp_path: Path
) -> None:
    home = tmp_path / NAMES[stage]
    home.mkdir()
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.labeled(16))
    fields: dict[str, Any] = {
        "name": "run", "storage_path": str(home / "runs"), "zero": {"stage": stage},
        "batch": {"global_batch_size": 8}, "resources": {"num_workers": 1},
        "stop": {"max_steps": 3, "max_time_s": 1e-3},
    }  # fmt: skip
    spec = tiny.job(models.bert, rows, tmp_path, **fields)
    first = train(spec)
    assert [c.step for c in committed(first.folder.checkpoints)] == [1]
    more = parse_spec(
        apply_overrides(spec.model_dump(mode="json", exclude_unset=True), ["stop.max_time_s=9999"])
    )
    second = train(more)
    folder = RunFolder(home / "runs" / "run")
    assert [r["step"] for r in read_steps(folder.steps)] == [1, 2, 3]
    assert len(read_records(folder.steps)) == 3, "it resumed and repeated no step"
    assert committed(folder.checkpoints)[0].step == 3
    for path in (second.export, second.report):
        assert path is not None
        assert path.exists()
    assert [run.root for run in list_runs(home / "runs")] == [folder.root]
    other = export_run(load_plan(folder), folder, home / "other", {"best": None})
    loaded: tuple[Plan, Any, Any] = load_exported(other)
    assert loaded[0].spec.name == "run"
