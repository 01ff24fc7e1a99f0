"""Base of tasks that read one text and predict through a sequence-classification head."""

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
)
from orchestrator.tasks.batches import pad, tokens_and_mask
from orchestrator.tasks.tokenizing import ends_with

if TYPE_CHECKING:
    import numpy as np
    import torch


class SequenceTask(Task):
    """One text in, one row of outputs out. What the outputs mean is up to the task."""

    text_column: str = "text"
    """Column with the text."""
    text_pair_column: str | None = None
    """Column with a second text, for tasks on pairs (a premise and a hypothesis, a question and an answer).
    Pairs that are too long lose tokens of the longer text first."""

    text_is_data: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    peft_task: ClassVar[str] = "SEQ_CLS"
    labeled_head: ClassVar[bool] = True
    pools: ClassVar[bool] = True
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
        """Return the targets for `losses`, one row per row."""

    @abstractmethod
    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row (rows,), of fp32 logits (rows, outputs)."""

    @abstractmethod
    def outcome(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        """Return the arrays that metrics need of each row."""

    @abstractmethod
    def prediction(self, outputs: torch.Tensor, names: Mapping[int, str]) -> dict[str, Any]:
        """One row's outputs (outputs,) in words."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.predict_columns, self.target_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        pair = self.text_pair_column
        return (self.text_column,) if pair is None else (self.text_column, pair)

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        if config.is_encoder_decoder:
            ends_with(tokenizer, config.eos_token_id)
        if self.text_pair_column is not None:
            tells_texts_apart(tokenizer, config)

    def features(self) -> dict[str, FeatureKind]:
        pair: dict[str, FeatureKind] = {"token_type_ids": "ints"} if self.text_pair_column else {}
        return {"input_ids": "ints", **pair, "label": self.target_kind}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out = [self._target_of(row, index) for row in rows]
        good = [i for i, row in enumerate(out) if not isinstance(row, BadRow)]
        texts = self._texts([rows[i] for i in good])
        for i, encoded in zip(good, _encoded(texts, tokenizer, max_length), strict=True):
            if self.text_pair_column is None:
                del encoded["token_type_ids"]
            out[i] = {**encoded, "label": out[i], "n_targets": 1}
        return out

    def _texts(self, rows: Sequence[RawRow]) -> list[list[str]]:
        """Return what the tokenizer takes: the texts, and the second ones where there are any."""
        return [[row[column] for row in rows] for column in self.predict_columns]

    def _target_of(self, row: RawRow, index: Mapping[str, int]) -> Any:
        for column in self.predict_columns:
            if why := text_problem(row.get(column), column):
                return BadRow(why)
        return self.target(row.get(self.target_column), index)

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        return {
            **tokens_and_mask([row["input_ids"] for row in rows], pad_id),
            **token_types(rows),
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

        inputs = tokenizer(
            *self._texts(rows),
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            logits = outputs_of(model, inputs if self.text_pair_column else _single(inputs))
        names = model.config.id2label
        columns = zip(("text", "text_pair"), self.predict_columns, strict=False)
        shown = list(columns)
        return [
            {**{name: row[column] for name, column in shown}, **self.prediction(outputs, names)}
            for row, outputs in zip(rows, logits, strict=True)
        ]


def _single(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs without the kinds of tokens, which are all alike in a single text."""
    return {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}


def _encoded(
    texts: Sequence[Sequence[str]], tokenizer: Any, max_length: int
) -> list[dict[str, Any]]:
    """Return `input_ids`, `token_type_ids` and `truncated` (1 where some were cut off) of each text or pair."""
    if not texts[0]:
        return []
    out = _rows(tokenizer(*map(list, texts), truncation=False, verbose=False), 0)
    long = [i for i, row in enumerate(out) if len(row["input_ids"]) > max_length]
    if long:
        cut = [[column[i] for i in long] for column in texts]
        for i, row in zip(
            long, _rows(tokenizer(*cut, truncation=True, max_length=max_length), 1), strict=True
        ):
            out[i] = row
    return out


def _rows(encoded: Any, truncated: int) -> list[dict[str, Any]]:
    ids = encoded["input_ids"]
    kinds = encoded.get("token_type_ids") or [[0] * len(one) for one in ids]
    return [
        {"input_ids": one, "token_type_ids": kind, "truncated": truncated}
        for one, kind in zip(ids, kinds, strict=True)
    ]


def token_types(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return padded `token_type_ids` (rows, longest), or nothing where the model knows no kinds of tokens."""
    if "token_type_ids" not in rows[0]:
        return {}
    kinds = pad([row["token_type_ids"] for row in rows], 0)
    return {"token_type_ids": kinds} if kinds.any() else {}


def tells_texts_apart(tokenizer: Any, config: Any) -> None:
    """Have a tokenizer give `token_type_ids` of pairs where the model has embeddings for two kinds or more."""
    import inspect

    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    kinds = getattr(config, "type_vocab_size", None)
    model: Any = CLASSES.get(type(config), None)
    accepted = model is not None and "token_type_ids" in inspect.signature(model.forward).parameters
    names = list(tokenizer.model_input_names)
    if not accepted or (kinds is not None and kinds < 2):
        names = [name for name in names if name != "token_type_ids"]
    elif kinds is not None and "token_type_ids" not in names:
        names.insert(1, "token_type_ids")
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names


def outputs_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Outputs (rows, outputs) in fp32."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    logits: torch.Tensor = model(**{name: batch[name] for name in names if name in batch}).logits
    return logits.float()
