"""What checkpoints cost: seconds that training stands still, and steps slowed down meanwhile.

MiniLM, fully tuned, at the interval that the plan chooses (for a run this short: 20 steps, the
closest it ever sets them). Sync and async runs take turns.

A step's time depends on its tokens, so the slow-down of the steps beside an upload is what they
took beyond a straight line through all other steps (seconds over tokens).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import (
    Options,
    classification_job,
    median,
    options,
    report,
    require_data,
    train,
    workspace,
)

from orchestrator.report.records import read_records, read_steps
from orchestrator.run_folder import RunFolder, read_json

MODES = ("async", "sync")
WARM_UP = 5


@dataclass(frozen=True)
class Cost:
    """One run. The last checkpoint is left out: every mode waits for it, and no step follows."""

    stall_s: float
    """Mean standstill per checkpoint."""
    slow_s: float
    """Mean slow-down of the steps beside an upload, per checkpoint."""
    commit_s: float
    """Mean time from the standstill's end to the commit; 0 where it was committed by then."""
    step_s: float
    """Median step that no upload touches."""
    share: float
    """Part of the run time, warm-up excluded, that went into checkpoints."""
    every_steps: int
    bytes: int


def main() -> None:
    given = options(__doc__ or "")
    require_data()
    costs: dict[str, list[Cost]] = {mode: [] for mode in MODES}
    with workspace() as folder:
        for i in range(given.repetitions):
            for mode in MODES if i % 2 == 0 else MODES[::-1]:
                job = checkpoint_job(f"{mode}-{i}", mode, given.quick)
                costs[mode].append(cost_of(train(folder, job)))
    show(costs, given)


def checkpoint_job(name: str, mode: str, quick: bool) -> dict[str, Any]:
    every = 6 if quick else "auto"
    job = classification_job(name, steps=25 if quick else 200)
    return job | {"checkpoint": {"every_steps": every, "mode": mode}}


def cost_of(folder: RunFolder) -> Cost:
    """From the run's own records."""
    plan = read_json(folder.plan)
    steps = [s for s in read_steps(folder.steps) if s["step"] > WARM_UP]
    events = read_records(folder.events)
    commits = {e["step"]: e["time"] for e in events if e["kind"] == "commit"}
    saves = [e for e in events if e["kind"] == "save" and e["step"] < plan["total_steps"]]
    stalls = [e["stall_s"] for e in saves]
    uploads = [(e["time"], commits[e["step"]]) for e in saves]
    beside = [touches(s, uploads) for s in steps]
    extra = slow_down(steps, beside)
    run_s = steps[-1]["time"] - (steps[0]["time"] - steps[0]["step_s"])
    alone = [s["step_s"] for s, near in zip(steps, beside, strict=True) if not near]
    return Cost(
        stall_s=statistics.mean(stalls),
        slow_s=extra / len(saves),
        commit_s=statistics.mean(max(0.0, done - saved) for saved, done in uploads),
        step_s=statistics.median(alone),
        share=(sum(stalls) + max(0.0, extra)) / run_s,
        every_steps=plan["checkpoint_every_steps"],
        bytes=plan["checkpoint_bytes"],
    )


def touches(step: dict[str, Any], uploads: list[tuple[float, float]]) -> bool:
    """Whether a step ran while a checkpoint was hashed and moved, or was the one after: old
    checkpoints are deleted when the new one is committed."""
    begin = step["time"] - step["step_s"]
    return any(begin <= done + step["step_s"] and step["time"] > saved for saved, done in uploads)


def slow_down(steps: list[dict[str, Any]], beside: list[bool]) -> float:
    """Seconds that the steps beside uploads took beyond what their tokens explain."""
    near = np.array(beside)
    tokens = np.array([s["tokens"] for s in steps], dtype=float)
    seconds = np.array([s["step_s"] for s in steps])
    slope, base = np.polyfit(tokens[~near], seconds[~near], 1)
    return float((seconds[near] - (slope * tokens[near] + base)).sum())


def show(costs: dict[str, list[Cost]], given: Options) -> None:
    figures: dict[str, Any] = {
        "checkpoint_every_steps": costs["async"][0].every_steps,
        "checkpoint_bytes": costs["async"][0].bytes,
    }
    for mode, runs in costs.items():
        for name in ("stall_s", "slow_s", "commit_s", "step_s", "share"):
            figures[f"{mode}_{name}"] = median([getattr(cost, name) for cost in runs])
        lost = [(c.stall_s + max(0.0, c.slow_s)) / c.step_s for c in runs]
        figures[f"{mode}_steps_per_checkpoint"] = median(lost)
        figures[f"{mode}_shares"] = [round(c.share, 4) for c in runs]
    words = {
        "stall_s": ("standstill per checkpoint", "{:.3f} s"),
        "slow_s": ("slow-down beside it", "{:.3f} s"),
        "commit_s": ("until it is committed", "{:.3f} s"),
        "step_s": ("a step without", "{:.3f} s"),
        "steps_per_checkpoint": ("standstill and slow-down, in steps", "{:.2f}"),
        "share": ("share of the run time (target: async < 5 %)", "{:.1%}"),
    }
    rows: list[tuple[str, ...]] = [("what", *MODES)]
    for name, (what, form) in words.items():
        rows.append((what, *(form.format(figures[f"{mode}_{name}"]) for mode in MODES)))
    size = figures["checkpoint_bytes"] / 1e6
    title = f"Checkpoints of {size:.0f} MB, one per {figures['checkpoint_every_steps']} steps"
    report(title, rows, figures, given)


if __name__ == "__main__":
    main()
