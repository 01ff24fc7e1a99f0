"""Tokens per second of `orchestrator train` against what one would otherwise write or run.

(a) packed rows: a hand-written DeepSpeed ZeRO-2 loop (handwritten.py)
(b) rows of natural length: transformers.Trainer with its defaults (hf_trainer.py), useful tokens

Both sides of a pair run in turn, with the same model, batch, optimizer and threads.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    MINILM,
    REVIEWS,
    THREADS,
    WORKERS,
    Options,
    classification_job,
    median,
    options,
    our_pace,
    pace,
    report,
    require_data,
    torchrun,
    train,
    workspace,
)

from orchestrator.report.records import read_steps

WARM_UP = 5
"""Steps at the start that count on no side."""
SEQUENCE = 128
VOCABULARY = 8192
PACKED_ROWS = 16


@dataclass
class Sizes:
    """Steps per run, warm-up included. Classification: whole pools of 50 batches, so that short
    and long batches have their share."""

    packed: int = 60
    classification: int = 150
    causal: int = 40


@dataclass
class Measured:
    """Tokens per second of every run, by side."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    loss_gap: list[float] = field(default_factory=list)

    def add(self, side: str, rate: float) -> None:
        self.rates.setdefault(side, []).append(rate)

    def rate(self, side: str) -> float:
        return median(self.rates[side])

    def ratio(self, ours: str, theirs: str) -> float:
        """The median of the ratios of runs that stood beside each other."""
        pairs = zip(self.rates[ours], self.rates[theirs], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 4)


def main() -> None:
    given = options(__doc__ or "")
    require_data()
    sizes = Sizes(packed=10, classification=10, causal=8) if given.quick else Sizes()
    measured = Measured()
    with workspace() as folder:
        tokenizer = make_tokenizer(folder / "tokenizer")
        for i in range(given.repetitions):
            packed_pair(folder, f"packed-{i}", tokenizer, sizes.packed, measured)
            classification_pair(folder, f"classification-{i}", sizes.classification, measured)
            causal_trio(folder, f"causal-{i}", sizes.causal, measured)
    show(measured, given)


def packed_pair(folder: Path, name: str, tokenizer: Path, steps: int, measured: Measured) -> None:
    """Ours, then the hand-written loop over the same rows."""
    job = causal_job(name, steps, llama(VOCABULARY), tokenizer) | {"zero": {"stage": 2}}
    ours = train(folder, job)
    ranks = torchrun(
        "handwritten.py", {"plan": str(ours.plan), "steps": steps}, folder / f"{name}-peer"
    )
    measured.add("packed_ours", our_pace(ours, WARM_UP).median_rate)
    tokens = [sum(step) for step in zip(*(r["tokens"] for r in ranks), strict=True)]
    measured.add("packed_handwritten", pace(ranks[0]["times"], tokens, WARM_UP).median_rate)
    losses = [statistics.mean(step) for step in zip(*(r["losses"] for r in ranks), strict=True)]
    mine = [s["loss"] for s in read_steps(ours.steps)]
    measured.loss_gap.append(max(abs(a - b) for a, b in zip(mine, losses, strict=True)))


def classification_pair(folder: Path, name: str, steps: int, measured: Measured) -> None:
    """Ours with its defaults, then Trainer with its own."""
    job = classification_job(name, steps)
    measured.add("classification_ours", our_pace(train(folder, job), WARM_UP).mean_rate)
    setup = {"task": "text_classification", "model": str(MINILM)}
    rows = job["batch"]["global_batch_size"] // WORKERS
    rate = trainer_rate(folder / f"{name}-peer", setup, rows, steps)
    measured.add("classification_trainer", rate)


def causal_trio(folder: Path, name: str, steps: int, measured: Measured) -> None:
    """Ours packed; Trainer with as many useful tokens per step; Trainer with as many rows per step.

    With equal rows a step of Trainer's holds a fifth of the tokens, and its optimizer and
    all-reduce weigh five times as much: the pair with equal tokens is the fair one.
    """
    config = llama(vocabulary=vocabulary_of(MINILM))
    ours = train(folder, causal_job(name, steps, config, MINILM))
    measured.add("causal_lm_ours", our_pace(ours, WARM_UP).mean_rate)
    setup = {"task": "causal_lm", "config": config}
    rows = PACKED_ROWS // WORKERS
    more = round(rows * SEQUENCE / tokens_per_document())
    rate = trainer_rate(folder / f"{name}-peer", setup, more, steps)
    measured.add("causal_lm_trainer", rate)
    rate = trainer_rate(folder / f"{name}-peer-rows", setup, rows, steps)
    measured.add("causal_lm_trainer_equal_rows", rate)


def trainer_rate(out: Path, setup: dict[str, Any], rows_per_device: int, steps: int) -> float:
    """Useful tokens per second of transformers.Trainer."""
    ranks = torchrun(
        "hf_trainer.py",
        {
            **setup,
            "tokenizer": str(MINILM),
            "train": str(REVIEWS),
            "max_length": SEQUENCE,
            "rows_per_device": rows_per_device,
            "steps": steps,
        },
        out,
    )
    tokens = [sum(step) for step in zip(*(r["tokens"] for r in ranks), strict=True)]
    return pace(ranks[0]["times"], tokens, WARM_UP).mean_rate


def causal_job(name: str, steps: int, config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """A Llama-shaped model from scratch on packed rows."""
    return {
        **classification_job(name, steps),
        "task": {"type": "causal_lm"},
        "model": {"config": config, "tokenizer": str(tokenizer)},
        "data": {"train": str(REVIEWS), "max_length_tokens": SEQUENCE},
        "batch": {"global_batch_size": PACKED_ROWS},
        "precision": "fp32",
    }


def llama(vocabulary: int) -> dict[str, Any]:
    """About 5 million parameters with 8,192 words."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 8,192 words, made from the reviews."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def texts() -> list[str]:
    with open(REVIEWS, encoding="utf-8", newline="") as handle:
        return [row["text"] for row in csv.DictReader(handle)]


def vocabulary_of(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def tokens_per_document() -> float:
    """Mean length of a review as Trainer sees it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    ids = tokenizer(texts(), truncation=True, max_length=SEQUENCE)["input_ids"]
    return statistics.mean(len(i) for i in ids)


def show(measured: Measured, given: Options) -> None:
    """Each pair in a row: both rates, their ratio, the target."""
    pairs = (
        ("vs_handwritten", "packed rows: DeepSpeed loop", "packed", "handwritten", "≥ 0.97"),
        (
            "classification_vs_trainer",
            "classification: Trainer",
            "classification",
            "trainer",
            "≥ 1.5",
        ),
        (
            "causal_lm_vs_trainer",
            "causal LM: Trainer, equal tokens",
            "causal_lm",
            "trainer",
            "≥ 1.5",
        ),
        ("causal_lm_vs_trainer_equal_rows", "…, equal rows", "causal_lm", "trainer_equal_rows", ""),
    )
    rows: list[tuple[str, ...]] = [
        ("against", "ours, tokens/s", "peer, tokens/s", "ratio", "target")
    ]
    figures: dict[str, Any] = {}
    for key, words, work, peer, target in pairs:
        ours, theirs = f"{work}_ours", f"{work}_{peer}"
        figures[key] = measured.ratio(ours, theirs)
        rates = [f"{measured.rate(side):,.0f}" for side in (ours, theirs)]
        rows.append((words, *rates, f"{figures[key]:.2f}", target))
    figures |= {f"{side}_tokens_per_s": measured.rate(side) for side in measured.rates}
    figures["largest_loss_difference_to_handwritten"] = median(measured.loss_gap)
    figures["runs"] = {side: [round(r, 1) for r in rates] for side, rates in measured.rates.items()}
    figures["threads_per_worker"] = THREADS
    report(f"Throughput, {WORKERS} workers of {THREADS} thread(s)", rows, figures, given)


if __name__ == "__main__":
    main()
