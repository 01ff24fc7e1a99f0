"""Extractive question answering: the answer is a span of the context, read in windows where it is long."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.errors import OrchestratorError
from orchestrator.tasks.base import BadRow, EncodedRow, FeatureKind, RawRow, Task, text_problem
from orchestrator.tasks.batches import pad, ragged, tokens_and_mask
from orchestrator.tasks.tokenizing import of_tokens
from orchestrator.tasks.windows import NO_ANSWER, tokens_of, windows_of

if TYPE_CHECKING:
    import numpy as np
    import torch


NUMPY_ARRAY = re.compile(r"array\((\[.*?\]), dtype=\w+\)", re.DOTALL)
"""How pandas writes the lists of a column of `datasets` into a CSV file."""


def answers_in(value: Any) -> tuple[list[Any], list[Any]] | None:
    """Return the answers' texts and where they begin; no answers where there is nothing.

    Args:
        value: `{text: [...], answer_start: [...]}`, a list of `{text, answer_start}`, or either written as
            text (JSON, Python, pandas).

    Returns None for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(NUMPY_ARRAY.sub(r"\1", value.strip()))
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return None
    if value is None:
        return [], []
    if isinstance(value, list | tuple) and all(isinstance(one, dict) for one in value):
        value = {key: [one.get(key) for one in value] for key in ("text", "answer_start")}
    if not isinstance(value, dict):
        return None
    texts, starts = (
        list(found) if isinstance(found, list | tuple) else [found]
        for found in (value.get("text"), value.get("answer_start"))
    )
    starts = [int(s) if isinstance(s, float) and s.is_integer() else s for s in starts]
    return (texts, starts) if len(texts) == len(starts) else None


def _without_space(text: str, start: int) -> tuple[int, int]:
    """Return the (start, stop) characters of an answer without the space around it, which few tokens hold."""
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


class QuestionAnswering(Task):
    """A question about a context, answered by a part of the context (Rajpurkar et al., arXiv 1606.05250).

    A prepared row is one window. A question counts once, by its best window.
    """

    type: Literal["question_answering"]
    question_column: str = "question"
    """Column with the question."""
    context_column: str = "context"
    """Column with the text that holds the answer."""
    answers_column: str = "answers"
    """Column with `{text: [...], answer_start: [...]}`, or a list of `{text, answer_start}`, as in SQuAD, or
    either as text: the right answers, and the character of the context where each begins. The first one is
    learned, an evaluation takes any of them."""
    stride_tokens: Annotated[int, Field(ge=0)] = 64
    """Tokens of the context that consecutive windows share. At least as long as the longest answer."""
    max_answer_tokens: Annotated[int, Field(ge=1), Affects(Effect.PREDICTION)] = 30
    """Longest answer that is given."""
    no_answer: bool = False
    """Some questions have no answer in their context (empty lists), as in SQuAD 2: to say so is right."""

    metric_names: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "loss")
    default_metric: ClassVar[str] = "f1"
    text_is_data: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    pipeline_tag: ClassVar[str] = "question-answering"
    peft_task: ClassVar[str] = "QUESTION_ANS"
    no_soft_targets: ClassVar[str] = "it points at a place, and each text has other places"
    sources: ClassVar[Mapping[str, str]] = {
        "stride_tokens": "a start and no more; BERT's run_squad.py moves windows on by 128 tokens",
        "max_answer_tokens": "BERT's run_squad.py (Devlin et al., arXiv 1810.04805)",
    }
    kept_features: ClassVar[tuple[str, ...]] = (
        "window",
        "context",
        "answers",
        "context_from",
        "char_starts",
        "char_stops",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.question_column, self.context_column, self.answers_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.question_column, self.context_column)

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        if not tokenizer.is_fast:
            raise OrchestratorError(
                f"question_answering needs to know where each token stands in the context, which "
                f"{type(tokenizer).__name__}, a tokenizer written in Python, does not tell. "
                "Choose a model with a tokenizer.json."
            )

    def features(self) -> dict[str, FeatureKind]:
        return {
            "input_ids": "ints",
            "token_type_ids": "ints",
            "context_from": "int",  # first token of the context; those that follow have characters
            "char_starts": "ints",
            "char_stops": "ints",
            "start": "int",
            "end": "int",
            "window": "int",  # 0 begins a question
            "context": "text",  # context and answers stand in window 0 only
            "answers": "text",
        }

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        return [self._encoded(row, tokenizer, max_length) for row in rows]

    def _encoded(self, row: RawRow, tokenizer: Any, max_length: int) -> EncodedRow | BadRow:
        if why := self._problem(row):
            return BadRow(why)
        windows = self._windows(row, tokenizer, max_length)
        if isinstance(windows, BadRow):
            return windows
        texts, starts = answers_in(row[self.answers_column]) or ([], [])
        span = _without_space(texts[0], starts[0]) if texts else None
        for window in windows:
            window["start"], window["end"] = tokens_of(span, window)
        if span and all(window["start"] == NO_ANSWER for window in windows):
            return BadRow(
                f"no window of {max_length} tokens holds the whole answer {texts[0]!r}: "
                "raise task.stride_tokens"
            )
        windows[0]["context"], windows[0]["answers"] = row[self.context_column], json.dumps(texts)
        return {"windows": windows, "truncated": 0}

    def _problem(self, row: RawRow) -> str | None:
        for column in self.predict_columns:
            if why := text_problem(row.get(column), column):
                return why
        if self.answers_column not in row:
            return f"column {self.answers_column!r} is missing"
        answers = answers_in(row[self.answers_column])
        if answers is None:
            return f"column {self.answers_column!r} must hold lists `text` and `answer_start` of one length"
        texts, starts = answers
        if not texts and not self.no_answer:
            return "has no answer; task.no_answer=true allows that"
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(start, int) or not isinstance(text, str) or not text.strip():
                return f"answer {text!r} at {start!r} is no text with its place"
            found = row[self.context_column][start : start + len(text)]
            if found != text:
                return f"answer {text!r} is not at character {start} of the context, {found!r} is"
        return None

    def _windows(self, row: RawRow, tokenizer: Any, max_length: int) -> list[EncodedRow] | BadRow:
        question, context = row[self.question_column].strip(), row[self.context_column]
        return windows_of(question, context, tokenizer, max_length, self.stride_tokens)

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        return [window for row in rows for window in row["windows"]], []

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        batch = tokens_and_mask([row["input_ids"] for row in rows], pad_id)
        kinds = pad([row["token_type_ids"] for row in rows], 0)
        if kinds.any():  # tokenizers that know no kinds leave them out: so do their models
            batch["token_type_ids"] = kinds
        for name in ("start", "end", "context_from"):
            batch[name] = torch.tensor([int(row[name]) for row in rows])
        batch["context_to"] = torch.tensor(
            [int(row["context_from"]) + len(row["char_starts"]) for row in rows]
        )
        batch["weights"] = torch.from_numpy(weights.astype(np.float32))
        return batch

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (_losses(*_logits(model, batch), batch) * batch["weights"]).sum()

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        starts, ends = _logits(model, batch)
        found = self._best_spans(starts, ends, batch)
        losses = _losses(starts, ends, batch)
        return {"loss": losses.cpu().numpy(), **{k: v.cpu().numpy() for k, v in found.items()}}

    def _best_spans(
        self, starts: torch.Tensor, ends: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The best span of each window: first and last token of the context, counted from its
        beginning, the span's score, and the score of no answer; each (rows,)."""
        import torch

        places = torch.arange(starts.shape[1], device=starts.device)
        inside = (places >= batch["context_from"][:, None]) & (
            places < batch["context_to"][:, None]
        )
        length = places[None, :] - places[:, None]
        allowed = (length >= 0) & (length < self.max_answer_tokens)
        allowed = allowed & inside[:, :, None] & inside[:, None, :]
        scores = (starts[:, :, None] + ends[:, None, :]).masked_fill(~allowed, -torch.inf)
        best, where = scores.flatten(1).max(-1)
        width = starts.shape[1]
        return {
            "first": where // width - batch["context_from"],
            "last": where % width - batch["context_from"],
            "score": best,
            "null_score": starts[:, NO_ANSWER] + ends[:, NO_ANSWER],
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Exact match and F1 over answers, 0 to 1, by SQuAD's rules; the best of the right answers."""
        from torchmetrics.functional.text import squad

        predictions: list[dict[str, str]] = []
        targets: list[Any] = []
        for i, windows in enumerate(_questions(gathered["window"])):
            answer, _ = self._answer(gathered, windows)
            right = json.loads(gathered["answers"][windows[0]]) or [""]
            predictions.append({"prediction_text": answer, "id": str(i)})
            target = {"text": right, "answer_start": [0] * len(right)}
            targets.append({"answers": target, "id": str(i)})
        scores = squad(predictions, targets)
        return {
            "loss": float(gathered["loss"].astype("float64").mean()),
            "exact_match": float(scores["exact_match"]) / 100,
            "f1": float(scores["f1"]) / 100,
            "questions": len(targets),
        }

    def _answer(self, found: dict[str, Any], windows: range) -> tuple[str, float]:
        """(the answer of a question, its score) from the best of its windows."""
        best = max(windows, key=lambda i: found["score"][i])
        score, null = float(found["score"][best]), min(found["null_score"][i] for i in windows)
        if self.no_answer and null > score:
            return "", float(null)
        start = found["char_starts"][best][found["first"][best]]
        stop = found["char_stops"][best][found["last"][best]]
        return found["context"][windows[0]][start:stop], score

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import numpy as np
        import torch

        out = []
        for row in rows:
            windows = self._windows(row, tokenizer, max_length)
            question = {"question": row[self.question_column]}
            if isinstance(windows, BadRow):
                out.append({**question, "answer": None, "why": windows.why})
                continue
            for window in windows:
                window |= {"start": NO_ANSWER, "end": NO_ANSWER}
            windows[0]["context"] = row[self.context_column]
            arrays = [{k: np.asarray(v) for k, v in window.items()} for window in windows]
            batch = self.collate(arrays, np.ones(len(arrays)), tokenizer.pad_token_id)
            with torch.no_grad():
                found: dict[str, Any] = self.measure(
                    model, {name: tensor.to(model.device) for name, tensor in batch.items()}
                )
            kept = {n: ragged([window[n] for window in windows]) for n in self.kept_features}
            answer, score = self._answer(found | kept, range(len(windows)))
            out.append({**question, "answer": answer, "score": round(score, 6)})
        return out


def _questions(windows: np.ndarray) -> Iterator[range]:
    """The rows of each question: its windows stand one after another, the first is numbered 0."""
    starts = [i for i, window in enumerate(windows) if window == 0]
    for start, stop in zip(starts, [*starts[1:], len(windows)], strict=True):
        yield range(start, stop)


def _logits(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of start and end (rows, tokens) in fp32; padding has none."""
    import torch

    names = ("input_ids", "attention_mask", "token_type_ids")
    outputs = model(**{name: batch[name] for name in names if name in batch})
    padding = batch["attention_mask"] == 0
    starts, ends = (
        of_tokens(logits, batch).float().masked_fill(padding, -torch.inf)
        for logits in (outputs.start_logits, outputs.end_logits)
    )
    return starts, ends


def _losses(
    starts: torch.Tensor, ends: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean cross-entropy of start and end (rows,)."""
    import torch.nn.functional as functional

    pairs = ((starts, batch["start"]), (ends, batch["end"]))
    losses = [functional.cross_entropy(logits, place, reduction="none") for logits, place in pairs]
    return (losses[0] + losses[1]) / 2
