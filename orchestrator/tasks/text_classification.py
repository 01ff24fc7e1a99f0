"""Single-label text classification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.errors import Problem
from orchestrator.tasks.base import BadRow, EncodedRow, RawRow, Task, pad, text_problem

if TYPE_CHECKING:
    import numpy as np
    import torch


class TextClassification(Task):
    """One label per text, through a sequence-classification head."""

    type: Literal["text_classification"]
    text_column: str = "text"
    """Column with the text."""
    label_column: str = "label"
    """Column with the label: text, integer or boolean."""
    labels: tuple[str, ...] | None = None
    """The label set, in the order of the model's outputs. Default: the distinct values of the training rows, sorted."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "loss",
    )
    default_metric: ClassVar[str] = "accuracy"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        if self.labels is None:
            return
        if len(set(self.labels)) != len(self.labels):
            yield Problem("task.labels", "holds a label twice", "list each once", self.labels)
        if len(self.labels) < 2:
            yield Problem("task.labels", "needs at least two labels", "", self.labels)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_column, self.label_column)

    @property
    def label_source(self) -> str | None:
        return self.label_column if self.labels is None else None

    def features(self) -> dict[str, Literal["int", "ints"]]:
        return {"input_ids": "ints", "label": "int"}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out: list[EncodedRow | BadRow] = [self._problem(row, index) or {} for row in rows]
        good = [i for i, row in enumerate(out) if not isinstance(row, BadRow)]
        if not good:
            return out
        texts = [rows[i][self.text_column] for i in good]
        whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        long = [k for k, ids in enumerate(whole) if len(ids) > max_length]
        if long:
            cut = tokenizer([texts[k] for k in long], truncation=True, max_length=max_length)
            for k, ids in zip(long, cut["input_ids"], strict=True):
                whole[k] = ids
        truncated = set(long)
        for k, i in enumerate(good):
            out[i] = {
                "input_ids": whole[k],
                "label": index[str(rows[i][self.label_column])],
                "n_targets": 1,
                "truncated": int(k in truncated),
            }
        return out

    def _problem(self, row: RawRow, index: dict[str, int]) -> BadRow | None:
        if why := text_problem(row.get(self.text_column), self.text_column):
            return BadRow(why)
        label = row.get(self.label_column)
        if label is None or label == "":
            return BadRow(f"column {self.label_column!r} is missing, null or empty")
        if str(label) not in index:
            known = ", ".join(list(index)[:10])
            return BadRow(f"unknown label {label!r}; the job knows: {known}")
        return None

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad(ids, pad_id),
            "attention_mask": pad([np.ones(len(i), dtype=np.int64) for i in ids], 0),
            "labels": torch.tensor([int(row["label"]) for row in rows]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as functional

        logits = _logits(model, batch)
        losses = functional.cross_entropy(logits.float(), batch["labels"], reduction="none")
        return (losses * batch["weights"]).sum()

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        import torch.nn.functional as functional

        logits = _logits(model, batch).float()
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
        return {
            "loss": losses.cpu().numpy(),
            "predicted": logits.argmax(-1).cpu().numpy(),
            "label": batch["labels"].cpu().numpy(),
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        import torch
        from torchmetrics.functional import classification as tm

        predicted = torch.from_numpy(gathered["predicted"])
        target = torch.from_numpy(gathered["label"])
        n = len(labels)
        precision, recall, f1 = (
            score(predicted, target, num_classes=n, average="none")
            for score in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
        )
        confusion = tm.multiclass_confusion_matrix(predicted, target, num_classes=n)
        return {
            "loss": float(gathered["loss"].astype("float64").mean()),
            "accuracy": float((predicted == target).double().mean()),
            "f1_macro": float(f1.mean()),
            "precision_macro": float(precision.mean()),
            "recall_macro": float(recall.mean()),
            "f1_per_class": {label: float(v) for label, v in zip(labels, f1, strict=True)},
            "confusion": confusion.tolist(),
        }

    def predict(
        self, model: Any, tokenizer: Any, texts: Sequence[str], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        inputs = tokenizer(
            list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            outputs = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits
        scores = outputs.float().softmax(-1)
        names = model.config.id2label
        return [
            {
                "text": text,
                "label": names[int(row.argmax())],
                "score": round(float(row.max()), 6),
            }
            for text, row in zip(texts, scores, strict=True)
        ]


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits
