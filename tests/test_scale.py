"""The simulation that growth is measured with: Tune's controller, controller and log are those of a sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_simulated_slots_run_every_trial_and_asha_prunes(
    ray: Any, models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    rows = [
        {"text": row["text"], "label": "positive" if row["label"] == "good" else "negative"}
        for row in tiny.labeled(60)
    ]
    for name in ("train", "eval"):
        tiny.write_csv(tmp_path / "reviews" / f"{name}.csv", rows)
    made = scale.job

    def short(*given: Any) -> dict[str, Any]:
        job = made(*given)
        return {**job, "data": {**job["data"], "max_length_tokens": 32}}

    monkeypatch.setattr(scale, "job", short)
    monkeypatch.setattr(scale, "MINILM", models.bert)
    monkeypatch.setattr(scale, "REVIEWS", tmp_path / "reviews" / "train.csv")
    ray.cloudpickle.register_pickle_by_value(scale)
    try:
        found = scale.simulate(tmp_path / "sweep", 12, 3)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(scale)
        sys.modules.pop("scale", None)
    assert (found["trials"], found["slots"]) == (12, 3)
    assert len(found["tenths"]) == 12, "a mark at each end"
    assert found["best"] > 0.5
    decisions = found["decisions_per_s"] * found["seconds"]
    assert 12 <= decisions < 3 * 12, "some were pruned"
