"""Causal language modelling: plain text, instruction pairs and chats; packed without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Tag

from orchestrator.tasks.base import (
    IGNORED,
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    SoftTargets,
    Task,
    of_tokens,
    pad,
)
from orchestrator.tasks.generation import complete
from orchestrator.tasks.packing import document, pack_stream, pack_whole
from orchestrator.tasks.templating import Targets, chat, instruction, plain
from orchestrator.tasks.usual import BY_SIZE, LM_NEW, LM_TUNED, Rate
from orchestrator.values import Frozen, by_type

if TYPE_CHECKING:
    import numpy as np
    import torch


class PlainRows(Frozen):
    """Each row is a document; every token is learnt."""

    type: Literal["plain"] = "plain"
    text_column: str = "text"
    """Column with the document."""


class InstructionRows(Frozen):
    """Each row is a prompt and its answer; loss on the answer only."""

    type: Literal["instruction"]
    prompt_column: str = "prompt"
    """Column with the prompt."""
    answer_column: str = "answer"
    """Column with the answer."""


class ChatRows(Frozen):
    """Each row is a list of `{role, content}` messages through the tokenizer's chat template;
    loss on the assistant's turns only."""

    type: Literal["chat"]
    messages_column: str = "messages"
    """Column with the list of messages."""


RowsSpec = Annotated[
    Annotated[PlainRows, Tag("plain")]
    | Annotated[InstructionRows, Tag("instruction")]
    | Annotated[ChatRows, Tag("chat")],
    by_type("plain"),
]


class CausalLM(Task):
    """Next-token prediction."""

    type: Literal["causal_lm"]
    rows: RowsSpec = PlainRows()
    """What an input row looks like."""
    packing: bool = True
    """Put several documents into one sequence. Positions restart and attention stays inside each."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    default_metric: ClassVar[str] = "loss"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    peft_task: ClassVar[str] = "CAUSAL_LM"
    all_logits: ClassVar[bool] = True
    usual_global_rows: ClassVar[int] = 16
    usual_global_rows_source: ClassVar[str] = (
        "a start and no more: Touvron et al., arXiv 2307.09288, tuned Llama 2 with 64 sequences"
    )
    tuned_rates: ClassVar[Mapping[str, Rate]] = LM_TUNED
    new_rates: ClassVar[BY_SIZE] = LM_NEW
    required_inputs: ClassVar[tuple[str, ...]] = ("position_ids",)
    has_scores: ClassVar[bool] = True
    soft_targets: ClassVar[SoftTargets | None] = "tokens"
    fixed_length: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        match self.rows:
            case PlainRows(text_column=column):
                return (column,)
            case InstructionRows(prompt_column=prompt, answer_column=answer):
                return (prompt, answer)
            case ChatRows(messages_column=column):
                return (column,)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return self.columns[:1]

    def features(self) -> dict[str, FeatureKind]:
        return {"input_ids": "ints", "is_target": "ints", "doc_lengths": "ints"}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        splits = isinstance(self.rows, PlainRows) and self.packing
        out: list[EncodedRow | BadRow] = []
        for pieces in self._pieces(rows, tokenizer):
            if isinstance(pieces, BadRow):
                out.append(pieces)
                continue
            ids, targets = pieces
            keep = len(ids) if splits else max_length
            row = document(ids[:keep], targets[:keep])
            row["truncated"] = int(len(ids) > keep)
            if row["n_targets"] == 0:
                out.append(BadRow(f"nothing to learn within {max_length} tokens"))
            else:
                out.append(row)
        return out

    def _pieces(self, rows: Sequence[RawRow], tokenizer: Any) -> list[Targets | BadRow]:
        match self.rows:
            case PlainRows(text_column=column):
                return plain([row.get(column) for row in rows], column, tokenizer)
            case InstructionRows(prompt_column=prompt, answer_column=answer):
                columns = (prompt, answer)
                return [
                    instruction(row.get(prompt), row.get(answer), columns, tokenizer)
                    for row in rows
                ]
            case ChatRows(messages_column=column):
                return [chat(row.get(column), column, tokenizer) for row in rows]

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        if not self.packing:
            return list(rows), []
        if isinstance(self.rows, PlainRows):
            return pack_stream(rows, max_length)
        return pack_whole(rows, max_length), []

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        labels, positions = [], []
        longest = max(len(row["input_ids"]) for row in rows)
        for row, weight in zip(rows, weights, strict=True):
            lengths = [*row["doc_lengths"], longest - len(row["input_ids"])]
            positions.append(np.concatenate([np.arange(n) for n in lengths]))
            learnt = (row["is_target"] > 0) & (weight > 0)
            labels.append(np.where(learnt, row["input_ids"], IGNORED))
        return {
            "input_ids": pad([row["input_ids"] for row in rows], pad_id),
            # Padding counts as one more document: no mask is needed to keep it apart.
            "position_ids": torch.from_numpy(np.stack(positions)),
            "labels": pad(labels, IGNORED),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as functional

        logits, labels = _shifted(model, batch)
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        logits, labels = _shifted(model, batch)
        return Scores(logits, labels, (labels != IGNORED).float())

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        import torch.nn.functional as functional

        logits, labels = _shifted(model, batch)
        rows = batch["labels"].shape[0]
        losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
        return {
            "loss": losses.double().view(rows, -1).sum(-1).cpu().numpy(),
            "n_targets": (labels != IGNORED).view(rows, -1).sum(-1).cpu().numpy(),
            "n_correct": correct.view(rows, -1).sum(-1).cpu().numpy(),
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        import math

        targets = int(gathered["n_targets"].sum())
        loss = float(gathered["loss"].sum()) / max(targets, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": int(gathered["n_correct"].sum()) / max(targets, 1),
            "target_tokens": targets,
        }

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        texts = [row[self.predict_columns[0]] for row in rows]
        as_chat = not isinstance(self.rows, PlainRows)
        return [
            {"text": text, "completion": complete(model, tokenizer, text, as_chat)}
            for text in texts
        ]


def _shifted(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows × length, vocabulary) in fp32 and the tokens they predict; a row's last predicts none.

    Labels are moved, not logits cut: a copy of the logits, and of their gradient, is not made.
    """
    import torch.nn.functional as functional

    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    logits = of_tokens(logits, batch)
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return logits.flatten(0, 1).float(), following.flatten()
