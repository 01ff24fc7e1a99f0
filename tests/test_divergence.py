"""When training is called diverged, and what is said of the checkpoints that are left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.launch.run import _how_to_go_on
from orchestrator.run_folder import RunFolder
from orchestrator.train.checkpoint import COMMIT
from orchestrator.train.state import Progress
from orchestrator.train.trial import Trial


def trial(max_skipped_steps: int = 3) -> Any:
    """A trial that has done seven steps, as far as the decision on the next one needs it."""
    fault_tolerance = SimpleNamespace(max_skipped_steps=max_skipped_steps)
    said: list[str] = []
    return SimpleNamespace(
        plan=SimpleNamespace(spec=SimpleNamespace(fault_tolerance=fault_tolerance)),
        progress=Progress(step=7),
        metrics_logger=SimpleNamespace(event=lambda kind, text: said.append(text)),
        said=said,
    )


def decision(one: Any, loss: float, norm: float | None, skipped: bool = False) -> bool:
    return Trial._diverged(cast(Trial, one), loss, norm, skipped)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_or_a_gradient_that_is_no_number_is_divergence(bad: float) -> None:
    assert decision(trial(), bad, 1.0)
    assert decision(trial(), 0.5, bad)
    assert not decision(trial(), 0.5, 1.0)
    assert not decision(trial(), 0.5, None), "DeepSpeed does not always know the norm"


def test_updates_skipped_in_a_row_are_named_and_the_last_one_too_many_is_divergence() -> None:
    one = trial(max_skipped_steps=3)
    for skipped in (True, True, False, True, True):
        assert not decision(one, 0.5, math.inf if skipped else 1.0, skipped)
    assert decision(one, 0.5, math.inf, skipped=True)
    assert len(one.said) == 5
    assert "update skipped, gradient not finite" in one.said[0]


def saved(folder: RunFolder, *steps: int) -> RunFolder:
    for step in steps:
        marker = folder.checkpoints / f"step-{step:08d}" / COMMIT
        marker.parent.mkdir(parents=True)
        marker.write_text(json.dumps({"step": step, "world_size": 1}))
    return folder


def test_after_divergence_the_checkpoint_it_began_from_is_not_called_good(tmp_path: Path) -> None:
    folder = saved(RunFolder(tmp_path), 5, 6, 7)
    outcome = {"status": "diverged", "step": 7, "facts": {"good_until_step": 6}}
    text = _how_to_go_on(folder, outcome)
    assert "Last good checkpoint: step 6 " in text
    assert "start over with what you change, --fresh or name=" in text
    assert "goes on from there" not in text, "it would repeat the same steps"
    none = {**outcome, "facts": {"good_until_step": 4}}
    assert _how_to_go_on(folder, none).startswith("No good checkpoint")


def test_after_any_other_end_the_same_command_goes_on(tmp_path: Path) -> None:
    lost = {"status": "lost", "step": 0, "facts": {}}
    assert _how_to_go_on(RunFolder(tmp_path), lost) == "No committed checkpoint is there."
    folder = saved(RunFolder(tmp_path), 5)
    text = _how_to_go_on(folder, lost)
    assert "Last committed checkpoint: step 5 " in text
    assert "The same command goes on from there" in text
    failed = _how_to_go_on(folder, {**lost, "status": "failed"})
    assert "Once its cause is mended, the same command goes on from there" in failed
