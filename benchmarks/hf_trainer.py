"""The peer of throughput.py: transformers.Trainer with its defaults, under torchrun.

Documents are tokenized before the clock starts; batches are padded to their longest row.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Documents(Dataset[dict[str, Any]]):
    """One document per row, at most `max_length` tokens."""

    def __init__(self, path: str, tokenizer: Any, max_length: int, with_label: bool) -> None:
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        texts = [row["text"] for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        labels = [{"label": int(row["label"] == "positive")} if with_label else {} for row in rows]
        self.rows = [
            {"input_ids": i, "attention_mask": [1] * len(i), **label}
            for i, label in zip(ids, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Counting:
    """A collator that remembers how many tokens of each batch are no padding."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collator(rows)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


class Clock(TrainerCallback):
    """The time of day at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.time())


def build(given: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """(model, collator) of the task."""
    if given["task"] == "text_classification":
        model = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=2)
        return model, DataCollatorWithPadding(tokenizer)
    fields = dict(given["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config), DataCollatorForLanguageModeling(
        tokenizer, mlm=False
    )


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
    model, collator = build(given, tokenizer)
    with_label = given["task"] == "text_classification"
    rows = Documents(given["train"], tokenizer, given["max_length"], with_label)
    counting, clock = Counting(collator), Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{given['out']}.output",
            per_device_train_batch_size=given["rows_per_device"],
            max_steps=given["steps"],
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=counting,
        callbacks=[clock],
    )
    trainer.train()
    facts = {"times": clock.times, "tokens": counting.tokens[: len(clock.times)]}
    Path(f"{given['out']}.{os.environ['RANK']}").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
