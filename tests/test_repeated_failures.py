"""An error of the job itself is not tried again and again; what the cluster did is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sweeps import write_lines

from orchestrator.errors import TrainingError
from orchestrator.launch import workers
from orchestrator.launch.repeated_failures import (
    failure_signature,
    record_failure,
    repeated_failure,
)
from orchestrator.launch.run import train
from orchestrator.report.records import append_event, read_records
from orchestrator.run_folder import RunFolder


def caught(error: Exception) -> Exception:
    """The error, as it is when somebody has raised it."""
    try:
        raise error
    except Exception as found:  # noqa: BLE001, whatever it is
        return found


@pytest.mark.parametrize(
    ("error", "comes_again"),
    [
        (ValueError("bad shape"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), False),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), False),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), False),
        (ConnectionError("reset"), False),
        (OSError("no space"), False),
    ],
)
def test_only_what_would_come_again_is_known_by_its_place(
    tmp_path: Path, error: Exception, comes_again: bool
) -> None:
    folder = RunFolder(tmp_path)
    write_lines(folder.steps, [{"step": 7}])
    place = failure_signature(caught(error), folder)
    assert (place is not None) is comes_again
    if place is not None:
        assert place.startswith(f"step 7: {type(error).__name__} in {__file__}")


def test_the_same_error_in_one_group_s_ranks_is_one_and_an_earlier_launch_s_does_not_count(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)

    def group(*errors: Exception) -> None:
        append_event(folder.events, "imports", workers=2)
        for error in errors:
            record_failure(caught(error), folder)

    append_event(folder.events, "launch")
    group(ValueError("bad"), ValueError("bad"))
    assert repeated_failure(folder) is None
    group(OSError("the disk"), TypeError("another"))
    assert repeated_failure(folder) is None
    append_event(folder.events, "launch")
    group(ValueError("bad"))
    assert repeated_failure(folder) is None
    group(ValueError("bad"))
    assert "step 0: ValueError in" in (repeated_failure(folder) or "")


@pytest.mark.timeout(200)
def test_a_run_whose_error_comes_again_ends_with_it_after_two_groups(
    ray: Any, models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(20))
    spec = tiny.job(
        models.bert, rows, tmp_path, stop={"max_steps": 3}, fault_tolerance={"max_failures": 6}
    )
    make = workers.make_trainer

    def broken(plan: Any, launch_id: str) -> Any:
        """A plan that passed every check, and that no worker can train by."""
        return make(plan.model_copy(update={"labels": plan.labels[:1]}), launch_id)

    monkeypatch.setattr("orchestrator.launch.run.make_trainer", broken)
    with pytest.raises(TrainingError, match="the same error ended two worker groups"):
        train(spec)
    folder = RunFolder(Path(spec.storage_path) / spec.name)
    assert sum(e["kind"] == "imports" for e in read_records(folder.events)) == 3
    assert json.loads(folder.outcome.read_text())["status"] == "failed"
