"""Causal language modeling: plain text, instruction pairs and chats; packed without padding."""

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
)
from orchestrator.tasks.batches import pad
from orchestrator.tasks.conversation import Encoded
from orchestrator.tasks.default_lr import BY_SIZE, LM_NEW, LM_TUNED, Rate
from orchestrator.tasks.generation import complete
from orchestrator.tasks.messages import TrainOn
from orchestrator.tasks.packing import (
    Packing,
    cut_long,
    document,
    model_inputs,
    pack_stream,
    pack_whole,
    row_inputs,
)
from orchestrator.tasks.templating import chat, instruction, plain
from orchestrator.tasks.tokenizing import of_tokens
from orchestrator.values import Frozen, by_type

if TYPE_CHECKING:
    import numpy as np
    import torch


class PlainRows(Frozen):
    """Each row is a document; every token is learned."""

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
    loss on the assistant's turns only. A message with `weight: 0` or `train: false` is not learned."""

    type: Literal["chat"]
    messages_column: str = "messages"
    """Column with the list of messages, or its JSON text."""
    tools_column: str = "tools"
    """Column with the tools on offer: a list of JSON schemas, or its JSON text. Rows may lack it."""
    train_on: TrainOn = "all"
    """Assistant turns that are learned: `all` of a conversation, or the `last`."""


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
    """Layout of the input rows: plain text, instructions or chats."""
    packing: Packing = True
    """Put several documents into one sequence. Positions restart and attention stays inside each: by position ids
    where the model's code keeps documents apart by them, else by a mask (`mask`), else packing is off. The plan
    probes a small copy of the model, and says which."""
    split_documents: bool = True
    """Of packed plain text: cut documents where a sequence is full, so that nothing is padded. False cuts only those
    that are longer than a sequence. Rows for evaluation never cut others, so figures do not depend on packing."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    default_metric: ClassVar[str] = "loss"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    peft_task: ClassVar[str] = "CAUSAL_LM"
    all_logits: ClassVar[bool] = True
    writes_on: ClassVar[bool] = True
    default_global_batch_size: ClassVar[int] = 16
    default_global_batch_size_source: ClassVar[str] = (
        "a start and no more: Touvron et al., arXiv 2307.09288, tuned Llama 2 with 64 sequences"
    )
    tuned_lrs: ClassVar[Mapping[str, Rate]] = LM_TUNED
    new_lrs: ClassVar[BY_SIZE] = LM_NEW
    reads_left_to_right: ClassVar[bool] = True
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
    def optional_columns(self) -> tuple[str, ...]:
        return (self.rows.tools_column,) if isinstance(self.rows, ChatRows) else ()

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
            keep = len(pieces.ids) if splits else max_length
            row = document(pieces.ids[:keep], pieces.targets[:keep])
            row["truncated"] = int(len(pieces.ids) > keep)
            row["notes"] = pieces.notes
            if row["n_targets"] == 0:
                out.append(BadRow(f"nothing to learn within {max_length} tokens"))
            else:
                out.append(row)
        return out

    def _pieces(self, rows: Sequence[RawRow], tokenizer: Any) -> list[Encoded | BadRow]:
        match self.rows:
            case PlainRows(text_column=column):
                return plain([row.get(column) for row in rows], column, tokenizer)
            case InstructionRows(prompt_column=prompt, answer_column=answer):
                columns = (prompt, answer)
                return [
                    instruction(row.get(prompt), row.get(answer), columns, tokenizer)
                    for row in rows
                ]
            case ChatRows(messages_column=column, tools_column=tools, train_on=train_on):
                return [
                    chat(row.get(column), column, tokenizer, row.get(tools), train_on)
                    for row in rows
                ]

    def targets(self, row: Mapping[str, Any]) -> int:
        return int(row["is_target"].sum())

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        if not self.packing:
            return list(rows), []
        if not isinstance(self.rows, PlainRows):
            return pack_whole(rows, max_length), []
        if self.split_documents:
            return pack_stream(rows, max_length)
        return pack_whole(cut_long(rows, max_length), max_length), []

    def for_evaluation(self) -> CausalLM:
        return self.model_copy(update={"split_documents": False})

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np

        labels = [
            np.where((row["is_target"] > 0) & (weight > 0), row["input_ids"], IGNORED)
            for row, weight in zip(rows, weights, strict=True)
        ]
        return {**row_inputs(rows, pad_id, self.packing), "labels": pad(labels, IGNORED)}

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
        column, as_chat = self.predict_columns[0], not isinstance(self.rows, PlainRows)
        tools = [row.get(name) for row in rows for name in self.optional_columns or ("",)]
        return [
            {"text": row[column], "completion": complete(model, tokenizer, row[column], as_chat, t)}
            for row, t in zip(rows, tools, strict=True)
        ]


def _shifted(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows × length, vocabulary) in fp32 and the tokens they predict; a row's last predicts none.

    Labels are moved, not logits cut: a copy of the logits, and of their gradient, is not made.
    """
    import torch.nn.functional as functional

    logits = model(**model_inputs(model, batch), use_cache=False).logits
    logits = of_tokens(logits, batch)
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return logits.flatten(0, 1).float(), following.flatten()
