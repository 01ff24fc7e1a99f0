"""Does a job reach what transformers.Trainer reaches with the same rows, seeds and hyperparameters?

Text classification, token classification and causal LM, with three seeds on both sides in turn. The metric is
that of the held-out rows after the last step. Equal means: the means differ by no more than the
seeds of either side do.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from common import (
    MINILM,
    REVIEWS,
    ROOT,
    WORKERS,
    Options,
    options,
    our_pace,
    pace,
    report,
    require_data,
    torchrun,
    train,
    workspace,
)
from throughput import llama, make_tokenizer

from orchestrator.report.records import read_steps
from orchestrator.run_folder import RunFolder, read_json

SEEDS = (1, 2, 3)
WARM_UP = 5
"""Steps at the start that do not count in the step times."""
WARM_UP_SHARE = 0.1
CLIP = 1.0
BROWN = ROOT / "jobs" / "data" / "brown"


@dataclass(frozen=True)
class Case:
    """A task with its data and the hyperparameters of both sides."""

    task: dict[str, Any]
    metric: str
    files: tuple[Path, Path]
    """Training and held-out rows."""
    max_length_tokens: int
    rows: int
    steps: int
    lr: float
    weight_decay: float
    model: Path | None = None


@dataclass
class Side:
    """What the runs of one side gave, by seed."""

    metrics: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)

    @property
    def spread(self) -> float:
        return max(self.metrics) - min(self.metrics)

    @property
    def mean(self) -> float:
        return statistics.mean(self.metrics)


def cases(quick: bool) -> dict[str, Case]:
    """One for each task of the table. No tagged sentence of the held-out ones is cut: a word that is lost counts as
    untagged here, and not at all in the library's recipe."""
    steps = 10 if quick else 60
    reviews = (REVIEWS, REVIEWS.with_name("eval.csv"))
    brown = (BROWN / "train.jsonl", BROWN / "eval.jsonl")
    labels = {"type": "text_classification", "labels": ["negative", "positive"]}
    tags = {"type": "token_classification", "labels": tags_of(brown[0])}
    return {
        "text classification": Case(labels, "accuracy", reviews, 64, 32, steps, 1e-4, 0.01, MINILM),
        "token classification": Case(tags, "f1", brown, 128, 32, steps, 3e-4, 0.01, MINILM),
        "causal LM": Case({"type": "causal_lm"}, "loss", reviews, 128, 16, steps, 2e-3, 0.1),
    }


def tags_of(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as handle:
        return sorted({tag for line in handle for tag in json.loads(line)["tags"]})


def main() -> None:
    given = options(__doc__ or "", repetitions=len(SEEDS))
    require_data()
    found: dict[str, tuple[Side, Side]] = {}
    with workspace() as folder:
        tokenizer = make_tokenizer(folder / "tokenizer")
        for name, case in cases(given.quick).items():
            found[name] = (Side(), Side())
            for seed in SEEDS[: given.repetitions]:
                run_name = f"{case.task['type'].replace('_', '-')}-{seed}"
                ours = run_ours(folder, run_name, case, seed, tokenizer, found[name][0])
                run_theirs(folder / f"{run_name}-peer", case, seed, ours, found[name][1])
    show(cases(given.quick), found, given)


def run_ours(
    folder: Path, name: str, case: Case, seed: int, tokenizer: Path, side: Side
) -> RunFolder:
    """`orchestrator train`; its model is evaluated once, at the end."""
    model = {"pretrained": str(case.model)} if case.model else {"config": llama(8192)}
    job = {
        "name": name,
        "seed": seed,
        "task": case.task,
        "model": model | ({} if case.model else {"tokenizer": str(tokenizer)}),
        "data": {
            "train": str(case.files[0]),
            "eval": str(case.files[1]),
            "max_length_tokens": case.max_length_tokens,
        },
        "optimizer": {
            "type": "adamw",
            "lr": case.lr,
            "weight_decay": case.weight_decay,
        },
        "gradient_clipping": CLIP,
        "schedule": {"type": "linear", "warmup_ratio": WARM_UP_SHARE},
        "batch": {"global_batch_size": case.rows},
        "precision": "fp32",
        "zero": {"stage": 2},
        "stop": {"max_steps": case.steps},
        "evaluation": {"every_steps": "end"},
        "checkpoint": {"every_steps": case.steps},
        "resources": {"num_workers": WORKERS, "gpus_per_worker": 0},
    }
    started = perf_counter()
    run = train(folder, job)
    side.wall_s.append(perf_counter() - started)
    outcome = read_json(run.outcome)
    assert outcome is not None
    side.metrics.append(outcome["last_eval"][case.metric])
    side.peak_bytes.append(outcome["facts"]["peak_memory_bytes"])
    side.step_s.append(statistics.mean(our_pace(run, WARM_UP).step_s))
    return run


def run_theirs(out: Path, case: Case, seed: int, ours: RunFolder, side: Side) -> None:
    """Trainer, with the rates that our run applied: its own linear schedule spends the first step at rate 0."""
    plan = read_json(ours.plan)
    assert plan is not None
    files = [str(path) for path in case.files]
    if case.model is None:
        files = [plan[split]["folder"] for split in ("train_data", "eval_data")]
    started = perf_counter()
    ranks = torchrun(
        "hf_parity.py",
        {
            "task": case.task["type"],
            "labels": case.task.get("labels"),
            "model": str(case.model) if case.model else None,
            "config": None if case.model else llama(8192),
            "files": files,
            "max_length": case.max_length_tokens,
            "rows_per_device": case.rows // WORKERS,
            "steps": case.steps,
            "rates": [step["lr"] for step in read_steps(ours.steps)],
            "weight_decay": case.weight_decay,
            "clip": CLIP,
            "seed": seed,
        },
        out,
    )
    side.wall_s.append(perf_counter() - started)
    side.metrics.append(ranks[0]["metric"])
    side.peak_bytes.append(max(rank["peak_bytes"] for rank in ranks))
    step_s = pace(ranks[0]["times"], [0] * len(ranks[0]["times"]), WARM_UP).step_s
    side.step_s.append(statistics.mean(step_s))


def show(all_cases: dict[str, Case], found: dict[str, tuple[Side, Side]], given: Options) -> None:
    """Metric of each side as mean (lowest to highest), the difference, times and memory."""
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "ours", "Trainer", "difference", "s/step", "s in all", "MiB/worker")
    ]
    figures: dict[str, Any] = {}
    for name, (ours, theirs) in found.items():
        difference = ours.mean - theirs.mean
        within = abs(difference) <= max(ours.spread, theirs.spread)
        rows.append(
            (
                name,
                all_cases[name].metric,
                *(
                    f"{s.mean:.4f} ({min(s.metrics):.4f} to {max(s.metrics):.4f})"
                    for s in (ours, theirs)
                ),
                f"{difference:+.4f} {'within' if within else 'OUTSIDE'} the seeds' spread",
                both(ours.step_s, theirs.step_s, 1, "{:.3f}"),
                both(ours.wall_s, theirs.wall_s, 1, "{:.0f}"),
                both(ours.peak_bytes, theirs.peak_bytes, 2**20, "{:,.0f}"),
            )
        )
        figures[name] = {
            "ours": vars(ours),
            "trainer": vars(theirs),
            "difference": difference,
            "within_spread": within,
        }
    report(
        f"Parity with Trainer, {len(ours.metrics)} seeds, {WORKERS} workers", rows, figures, given
    )


def both(ours: list[float], theirs: list[float], unit: float, shape: str) -> str:
    """The medians of both sides."""
    return " / ".join(shape.format(statistics.median(side) / unit) for side in (ours, theirs))


if __name__ == "__main__":
    main()
