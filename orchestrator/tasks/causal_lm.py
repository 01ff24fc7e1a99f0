"""Causal language modelling: plain text, instruction pairs and chats; packed without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Tag

from orchestrator.tasks.base import BadRow, EncodedRow, RawRow, Task, pad, text_problem
from orchestrator.values import Frozen, by_type

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORED = -100
"""`transformers`' label value for positions without loss."""


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

    def features(self) -> dict[str, Literal["int", "ints"]]:
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
            row = _row(ids[:keep], targets[:keep])
            row["truncated"] = int(len(ids) > keep)
            if row["n_targets"] == 0:
                out.append(BadRow(f"nothing to learn within {max_length} tokens"))
            else:
                out.append(row)
        return out

    def _pieces(
        self, rows: Sequence[RawRow], tokenizer: Any
    ) -> list[tuple[list[int], list[int]] | BadRow]:
        """(token ids, 1 where the token is learnt) per row."""
        match self.rows:
            case PlainRows(text_column=column):
                return [_plain(row.get(column), column, tokenizer) for row in rows]
            case InstructionRows() as spec:
                return [_instruction(row, spec, tokenizer) for row in rows]
            case ChatRows(messages_column=column):
                return [_chat(row.get(column), column, tokenizer) for row in rows]

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        if not self.packing:
            return list(rows), []
        if isinstance(self.rows, PlainRows):
            return _pack_stream(rows, max_length)
        return _pack_whole(rows, max_length), []

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
        self, model: Any, tokenizer: Any, texts: Sequence[str], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        out = []
        for text in texts:
            inputs = _prompt(text, self.rows, tokenizer).to(model.device)
            with torch.no_grad():
                tokens = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=64,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                )
            answer = tokenizer.decode(tokens[0, inputs.shape[1] :], skip_special_tokens=True)
            out.append({"text": text, "completion": answer})
        return out


def _shifted(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows × (length−1), vocabulary) in fp32 and the tokens they predict."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    predicting = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return predicting, batch["labels"][:, 1:].reshape(-1)


def _row(ids: list[int], targets: list[int]) -> EncodedRow:
    """One document. Its first token has nothing before it to be predicted from."""
    targets = [0, *targets[1:]]
    return {
        "input_ids": ids,
        "is_target": targets,
        "doc_lengths": [len(ids)],
        "n_targets": sum(targets),
        "truncated": 0,
    }


def _join(rows: Sequence[EncodedRow]) -> EncodedRow:
    joined = {
        name: [v for row in rows for v in row[name]]
        for name in ("input_ids", "is_target", "doc_lengths")
    }
    return {
        **joined,
        "n_targets": sum(joined["is_target"]),
        "truncated": sum(row["truncated"] for row in rows),
    }


def _pack_stream(
    rows: Sequence[EncodedRow], max_length: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Fill each sequence to the last token, splitting documents; the unfilled rest is kept back."""
    out: list[EncodedRow] = []
    held: list[EncodedRow] = []
    room = max_length
    for ids, targets in _documents(rows):
        while ids:
            piece = _row(ids[:room], targets[:room])
            held.append(piece)
            room -= len(piece["input_ids"])
            ids, targets = ids[len(piece["input_ids"]) :], targets[len(piece["input_ids"]) :]
            if room == 0:
                out.append(_join(held))
                held, room = [], max_length
    return out, [_join(held)] if held else []


def _documents(rows: Sequence[EncodedRow]) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, targets) of each document; rows that were kept back hold several."""
    for row in rows:
        stop = 0
        for length in row["doc_lengths"]:
            start, stop = stop, stop + length
            yield row["input_ids"][start:stop], row["is_target"][start:stop]


def _pack_whole(rows: Sequence[EncodedRow], max_length: int) -> list[EncodedRow]:
    """First-fit decreasing over a batch of rows: an answer is never cut from its prompt."""
    bins: list[list[EncodedRow]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        length = len(row["input_ids"])
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([row])
            room.append(max_length - length)
        else:
            bins[place].append(row)
            room[place] -= length
    return [_join(b) for b in bins]


def _plain(text: Any, column: str, tokenizer: Any) -> tuple[list[int], list[int]] | BadRow:
    if why := text_problem(text, column):
        return BadRow(why)
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    ids = _ended(ids, tokenizer)
    return ids, [1] * len(ids)


def _instruction(
    row: RawRow, spec: InstructionRows, tokenizer: Any
) -> tuple[list[int], list[int]] | BadRow:
    prompt, answer = row.get(spec.prompt_column), row.get(spec.answer_column)
    why = text_problem(prompt, spec.prompt_column) or text_problem(answer, spec.answer_column)
    if why:
        return BadRow(why)
    if tokenizer.chat_template:
        turns = (("user", prompt), ("assistant", answer))
        messages = [{"role": role, "content": str(content)} for role, content in turns]
        return _templated(messages, tokenizer)
    head = tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"]
    tail = _ended(
        tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer
    )
    return head + tail, [0] * len(head) + [1] * len(tail)


def _chat(messages: Any, column: str, tokenizer: Any) -> tuple[list[int], list[int]] | BadRow:
    if messages is None or isinstance(messages, str) or not len(messages):
        return BadRow(f"column {column!r} must be a non-empty list of messages")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return BadRow(f"column {column!r}: a message needs `role` and `content`")
        if why := text_problem(turn.get("content"), f"{column}.content"):
            return BadRow(why)
        turns.append({"role": turn["role"], "content": turn["content"]})
    if all(turn["role"] != "assistant" for turn in turns):
        return BadRow(f"column {column!r} holds no assistant turn to learn from")
    if not tokenizer.chat_template:
        return BadRow("the tokenizer has no chat template; use task.rows.type: instruction")
    return _templated(turns, tokenizer)


def _templated(
    messages: list[dict[str, str]], tokenizer: Any
) -> tuple[list[int], list[int]] | BadRow:
    """Each assistant turn is what the template adds after its generation prompt."""
    import jinja2

    def render(turns: list[dict[str, str]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    spans: list[tuple[int, int]] = []
    try:
        text = render(messages)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(messages[:i], prompt=True), render(messages[: i + 1])
            if not (text.startswith(after.rstrip()) and after.startswith(before)):
                return BadRow("the chat template rewrites earlier turns: no telling what is learnt")
            spans.append((len(before), len(after.rstrip("\n"))))
    except jinja2.TemplateError as error:  # as in "roles must alternate"
        return BadRow(f"the chat template refuses it: {error}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Tokenizers that trim their offsets give a token of spaces an empty span at its end.
    targets = [
        int(any(a <= start and end <= b and (start < end or a < start) for a, b in spans))
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), targets


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _prompt(text: str, rows: RowsSpec, tokenizer: Any) -> torch.Tensor:
    if not isinstance(rows, PlainRows) and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokenizer(text, return_tensors="pt")["input_ids"]
