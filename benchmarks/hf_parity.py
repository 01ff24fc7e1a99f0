"""The peer of parity.py: transformers.Trainer as its documentation teaches it, under torchrun.

Reads the files itself, tokenizes and aligns labels by the library's own recipes, and is told the
hyperparameters of our job. For causal LM the rows are those that our run prepared: how documents are cut
into rows is a choice, not a result.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hf_trainer import Clock
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

IGNORED = -100


class Rows(Dataset[dict[str, Any]]):
    """Rows as the collator takes them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Rates(TrainerCallback):
    """The learning rate of each step, from a list."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for group in given["optimizer"].param_groups:
            group["lr"] = self.rates[state.global_step]


def classification(given: dict[str, Any]) -> tuple[Any, Any, Any, list[Rows]]:
    """(model, collator, metrics, splits) of texts with one label each."""
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    names = given["labels"]

    def read(path: str) -> Rows:
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        texts = [row["text"] for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=given["max_length"])["input_ids"]
        labels = [names.index(row["label"]) for row in rows]
        return Rows([{"input_ids": i, "label": n} for i, n in zip(ids, labels, strict=True)])

    def metrics(predicted: Any) -> dict[str, float]:
        right = predicted.predictions.argmax(-1) == predicted.label_ids
        return {"metric": float(right.mean())}

    model = AutoModelForSequenceClassification.from_pretrained(
        given["model"], num_labels=len(names)
    )
    return model, DataCollatorWithPadding(tokenizer), metrics, [read(p) for p in given["files"]]


def tags(given: dict[str, Any]) -> tuple[Any, Any, Any, list[Rows]]:
    """(model, collator, metrics, splits) of words with one tag each, learned at a word's first token."""
    from seqeval.metrics import f1_score

    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    names = given["labels"]

    def read(path: str) -> Rows:
        with open(path, encoding="utf-8") as handle:
            rows = [json.loads(line) for line in handle]
        encoded = tokenizer(
            [row["tokens"] for row in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=given["max_length"],
        )
        out = []
        for i, row in enumerate(rows):
            words, labels = encoded.word_ids(i), []
            for at, word in enumerate(words):
                first = word is not None and (at == 0 or words[at - 1] != word)
                labels.append(names.index(row["tags"][word]) if first else IGNORED)
            out.append({"input_ids": encoded["input_ids"][i], "labels": labels})
        return Rows(out)

    def metrics(predicted: Any) -> dict[str, float]:
        best, true = predicted.predictions.argmax(-1), predicted.label_ids
        spelled = [[[], []] for _ in true]
        for both, guesses, labels in zip(spelled, best, true, strict=True):
            for guess, label in zip(guesses, labels, strict=True):
                if label != IGNORED:
                    both[0].append(names[label])
                    both[1].append(names[guess])
        return {"metric": float(f1_score([b[0] for b in spelled], [b[1] for b in spelled]))}

    model = AutoModelForTokenClassification.from_pretrained(given["model"], num_labels=len(names))
    collator = DataCollatorForTokenClassification(tokenizer)
    return model, collator, metrics, [read(path) for path in given["files"]]


def packed_text(given: dict[str, Any]) -> tuple[Any, Any, Any, list[Rows]]:
    """(model, collator, metrics, splits) of packed rows, with positions that restart at each document."""
    from orchestrator.data.manifest import read_manifest
    from orchestrator.data.shards import open_shards
    from orchestrator.data.stream import unpack_rows

    def read(folder: str) -> Rows:
        manifest = read_manifest(Path(folder))
        assert manifest is not None
        rows = unpack_rows(open_shards(folder, manifest).take(np.arange(manifest.rows)))
        out = []
        for row in rows:
            if len(row["input_ids"]) < given["max_length"]:
                continue  # the last row of a split may be short: the default collator takes equal ones
            positions = np.concatenate([np.arange(n) for n in row["doc_lengths"]])
            ids = np.array(row["input_ids"], dtype=np.int64)
            labels = np.where(row["is_target"] > 0, ids, IGNORED)
            out.append({"input_ids": ids, "position_ids": positions, "labels": labels})
        return Rows(out)

    fields = dict(given["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, use_cache=False)
    model = AutoModelForCausalLM.from_config(config)
    return model, default_data_collator, None, [read(folder) for folder in given["files"]]


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    transformers.logging.set_verbosity_error()
    set_seed(given["seed"])
    build = {
        "text_classification": classification,
        "token_classification": tags,
        "causal_lm": packed_text,
    }
    model, collator, metrics, (train_rows, eval_rows) = build[given["task"]](given)
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{given['out']}.output",
            seed=given["seed"],
            per_device_train_batch_size=given["rows_per_device"],
            per_device_eval_batch_size=given["rows_per_device"],
            max_steps=given["steps"],
            learning_rate=max(given["rates"]),
            weight_decay=given["weight_decay"],
            lr_scheduler_type="constant",
            max_grad_norm=given["clip"],
            # True multiplies the mean loss of BERT's heads by the number of workers: other gradients, clipped more
            average_tokens_across_devices=given["task"] == "causal_lm",
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            save_strategy="no",
            prediction_loss_only=metrics is None,
            disable_tqdm=True,
        ),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=[clock, Rates(given["rates"])],
    )
    trainer.train()
    found = trainer.evaluate()
    facts = {
        "metric": found.get("eval_metric", found["eval_loss"]),
        "times": clock.times,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(f"{given['out']}.{os.environ['RANK']}").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
