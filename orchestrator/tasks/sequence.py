"""What tasks share that read one text and predict through a sequence-classification head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.tasks.base import (
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    Task,
    text_problem,
    tokens_and_mask,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


class SequenceTask(Task):
    """One text in, one row of outputs out. What the outputs mean is up to the task."""

    text_column: str = "text"
    """Column with the text."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    peft_task: ClassVar[str] = "SEQ_CLS"
    labelled_head: ClassVar[bool] = True
    target_kind: ClassVar[FeatureKind]
    """What the feature `label` holds."""

    @property
    @abstractmethod
    def target_column(self) -> str:
        """The column with what is to be predicted."""

    @abstractmethod
    def target(self, value: Any, index: Mapping[str, int]) -> Any:
        """The feature `label` of a raw value, or a BadRow; `index`: label → output."""

    @abstractmethod
    def target_tensor(self, targets: Sequence[Any]) -> torch.Tensor:
        """What `losses` compares with, one row per row."""

    @abstractmethod
    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row (rows,), of fp32 logits (rows, outputs)."""

    @abstractmethod
    def outcome(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        """What metrics need of each row."""

    @abstractmethod
    def prediction(self, outputs: torch.Tensor, names: Mapping[int, str]) -> dict[str, Any]:
        """One row's outputs (outputs,) in words."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_column, self.target_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.text_column,)

    def features(self) -> dict[str, FeatureKind]:
        return {"input_ids": "ints", "label": self.target_kind}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out = [self._target_of(row, index) for row in rows]
        good = [i for i, row in enumerate(out) if not isinstance(row, BadRow)]
        texts = [rows[i][self.text_column] for i in good]
        for i, (ids, truncated) in zip(good, _encoded(texts, tokenizer, max_length), strict=True):
            out[i] = {
                "input_ids": ids,
                "label": out[i],
                "n_targets": 1,
                "truncated": truncated,
            }
        return out

    def _target_of(self, row: RawRow, index: Mapping[str, int]) -> Any:
        if why := text_problem(row.get(self.text_column), self.text_column):
            return BadRow(why)
        return self.target(row.get(self.target_column), index)

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        return {
            **tokens_and_mask([row["input_ids"] for row in rows], pad_id),
            "labels": self.target_tensor([row["label"] for row in rows]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        return Scores(outputs_of(model, batch), batch["labels"], batch["weights"])

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = self.losses(outputs_of(model, batch), batch["labels"])
        return (losses * batch["weights"]).sum()

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        logits = outputs_of(model, batch)
        losses = self.losses(logits, batch["labels"])
        return {"loss": losses.cpu().numpy(), **self.outcome(logits, batch["labels"])}

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        texts = [row[self.text_column] for row in rows]
        inputs = tokenizer(
            texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            logits = outputs_of(model, inputs)
        names = model.config.id2label
        return [
            {"text": text, **self.prediction(row, names)}
            for text, row in zip(texts, logits, strict=True)
        ]


def _encoded(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[tuple[list[int], int]]:
    """(token ids, 1 where some were cut off) of each text."""
    if not texts:
        return []
    whole = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    out = [(ids, 0) for ids in whole]
    long = [i for i, ids in enumerate(whole) if len(ids) > max_length]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)
        for i, ids in zip(long, cut["input_ids"], strict=True):
            out[i] = (ids, 1)
    return out


def outputs_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Outputs (rows, outputs) in fp32."""
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits.float()
