"""Token classification: a tag per word, and the entities that the tags spell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.errors import Problem
from orchestrator.tasks.base import (
    IGNORED,
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    SoftTargets,
    Task,
    text_problem,
    token_scores,
)
from orchestrator.tasks.batches import pad, ragged, tokens_and_mask
from orchestrator.tasks.labels import label_name, label_number, label_problems, list_in, shown
from orchestrator.tasks.tags import OUTSIDE, Scheme, entities_in, entity_scores, scheme_of
from orchestrator.tasks.tokenizing import of_tokens, words_have_leading_space
from orchestrator.tasks.words import NO_TOKEN, aligned

if TYPE_CHECKING:
    import numpy as np
    import torch

WORDS = re.compile(r"\w+|[^\w\s]")
"""How a text is cut into words where none are given: runs of letters and digits, single marks."""


def _is_ignored(tag: Any) -> bool:
    """Tell whether a tag is the number by which PyTorch's losses leave a word out."""
    return isinstance(tag, int | float) and tag == IGNORED


class TokenClassification(Task):
    """One tag per word, learned and predicted at the word's first token."""

    type: Literal["token_classification"]
    tokens_column: str = "tokens"
    """Column with the words of a text, as a list or a list written as text."""
    tags_column: str = "tags"
    """Column with the tags, one per word, as a list or a list written as text. A word tagged -100 is neither
    learned nor counted."""
    entities: bool = True
    """Count whole entities, by the scheme that the tag set shows: IOB1 and IOB2 as conlleval does, IOBES and
    BILOU where an entity is complete, names without a prefix (`PER`, `O`) as runs of one name. Words are
    counted where tags spell no entities (no prefix and no `O`, as parts of speech), and if false."""
    labels: tuple[str, ...] | None = None
    """The tag set, in the order of the model's outputs; integers in the rows count from 0 through it, unless
    they are tags themselves. Default: the names in a Parquet file's `datasets` metadata, else all tags of the
    training rows, sorted."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "f1",
        "precision",
        "recall",
        "f1_macro",
        "accuracy",
        "loss",
    )
    default_metric: ClassVar[str] = "f1"
    text_is_data: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    has_scores: ClassVar[bool] = True
    label_feature: ClassVar[str] = "tags"
    soft_targets: ClassVar[SoftTargets | None] = "classes"
    pipeline_tag: ClassVar[str] = "token-classification"
    peft_task: ClassVar[str] = "TOKEN_CLS"
    labeled_head: ClassVar[bool] = True
    kept_features: ClassVar[tuple[str, ...]] = ("positions", "tags")

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from label_problems(self.labels)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.tokens_column, self.tags_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.tokens_column,)

    @property
    def label_source(self) -> str | None:
        return self.tags_column if self.labels is None else None

    def labels_in(self, value: Any) -> Iterable[str] | BadRow:
        tags = self._list(value, self.tags_column)
        if isinstance(tags, BadRow):
            return tags
        names: list[str] = []
        for name in map(label_name, (tag for tag in tags if not _is_ignored(tag))):
            if isinstance(name, BadRow):
                return BadRow(f"column {self.tags_column!r} holds a value that {name.why}")
            names.append(name)
        return names

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        words_have_leading_space(tokenizer)

    def features(self) -> dict[str, FeatureKind]:
        return {"input_ids": "ints", "positions": "ints", "tags": "ints"}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out: list[EncodedRow | BadRow] = []
        for row in rows:
            read = self._words_and_tags(row, index)
            if isinstance(read, BadRow):
                out.append(read)
                continue
            words, tags = read
            encoded = aligned(words, tokenizer, max_length)
            kept = [i for i, tag in enumerate(tags) if tag != IGNORED]
            encoded["tags"] = [tags[i] for i in kept]
            encoded["positions"] = [encoded["positions"][i] for i in kept]
            encoded["n_targets"] = sum(at != NO_TOKEN for at in encoded["positions"])
            if encoded["n_targets"] == 0:
                out.append(BadRow(f"no word has a token within {max_length} tokens"))
            else:
                out.append(encoded)
        return out

    def _words_and_tags(
        self, row: RawRow, index: Mapping[str, int]
    ) -> tuple[list[str], list[int]] | BadRow:
        """Return a row's words and the numbers of their tags, or why it cannot be used."""
        words = self._list(row.get(self.tokens_column), self.tokens_column)
        tags = self._list(row.get(self.tags_column), self.tags_column)
        for read in (words, tags):
            if isinstance(read, BadRow):
                return read
        assert isinstance(words, list)
        assert isinstance(tags, list)
        if len(words) != len(tags):
            return BadRow(f"{len(words)} words have {len(tags)} tags")
        if not all(isinstance(word, str) for word in words):
            return BadRow(f"column {self.tokens_column!r} must hold texts")
        numbers: list[int] = []
        for tag in tags:
            if _is_ignored(tag) and str(IGNORED) not in index:
                numbers.append(IGNORED)
                continue
            number = label_number(tag, index, given=self.labels is not None, what="tag")
            if isinstance(number, BadRow):
                holds = number.why.startswith(("is ", "must "))
                why = f"column {self.tags_column!r} holds a value that {number.why}"
                return BadRow(why if holds else number.why)
            numbers.append(number)
        return words, numbers

    def _list(self, value: Any, column: str) -> list[Any] | BadRow:
        if value is None:
            return BadRow(f"column {column!r} is missing or null")
        items = list_in(value)
        if not items:
            return BadRow(f"column {column!r} must be a non-empty list, got {shown(value)}")
        return items

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np

        labels = []
        for row, weight in zip(rows, weights, strict=True):
            of_tokens = np.full(len(row["input_ids"]), IGNORED)
            seen = row["positions"] != NO_TOKEN
            if weight > 0:
                of_tokens[row["positions"][seen]] = row["tags"][seen]
            labels.append(of_tokens)
        return {
            **tokens_and_mask([row["input_ids"] for row in rows], pad_id),
            "labels": pad(labels, IGNORED),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return _losses(_logits(model, batch), batch["labels"]).sum()

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        return token_scores(_logits(model, batch), batch["labels"])

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        logits = _logits(model, batch)
        losses = _losses(logits, batch["labels"]).double()
        predicted, targets = logits.argmax(-1).cpu(), batch["labels"].cpu() != IGNORED
        return {
            "loss": losses.sum(-1).cpu().numpy(),
            "predicted": ragged(
                [row[on].numpy() for row, on in zip(predicted, targets, strict=True)]
            ),
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Every word counts; one without a token, as of a row cut short, is taken for predicted `O`."""
        predicted = [
            _tags(found, positions, labels)
            for found, positions in zip(gathered["predicted"], gathered["positions"], strict=True)
        ]
        true = [[labels[tag] for tag in tags] for tags in gathered["tags"]]
        pairs = [
            pair for a, b in zip(true, predicted, strict=True) for pair in zip(a, b, strict=True)
        ]
        scheme = self._scheme(labels)
        words_with_loss = sum(len(found) for found in gathered["predicted"])
        return {
            "loss": float(gathered["loss"].sum()) / max(words_with_loss, 1),
            "accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1),
            "words": len(pairs),
            "confusion": _confusion(pairs, labels),
            **(_tag_scores(pairs) if scheme == "words" else entity_scores(true, predicted, scheme)),
        }

    def _scheme(self, labels: Sequence[str]) -> Scheme:
        return scheme_of(labels) if self.entities else "words"

    def prediction_problem(self, row: RawRow) -> str | None:
        words = row[self.tokens_column]
        if isinstance(words, str):
            return text_problem(words, self.tokens_column)
        if not isinstance(words, list | tuple) or not words:
            return (
                f"column {self.tokens_column!r} must be a text or a non-empty list, got {words!r}"
            )
        whys = (text_problem(w, self.tokens_column) for w in words if not isinstance(w, str) or w)
        return next((why for why in whys if why), None)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import numpy as np
        import torch

        given = [row[self.tokens_column] for row in rows]
        texts = [WORDS.findall(one) if isinstance(one, str) else list(one) for one in given]
        encoded = [aligned(words, tokenizer, max_length) for words in texts]
        ids = [np.array(one["input_ids"]) for one in encoded]
        batch = tokens_and_mask(ids, tokenizer.pad_token_id)
        with torch.no_grad():
            logits = _logits(model, {name: t.to(model.device) for name, t in batch.items()})
        names = [name for _, name in sorted(model.config.id2label.items())]
        scheme = self._scheme(names)
        out = []
        for words, one, of_row in zip(texts, encoded, logits.argmax(-1).cpu().numpy(), strict=True):
            positions = np.array(one["positions"], dtype=np.int64)
            tags = _tags(of_row[positions[positions != NO_TOKEN]], positions, names)
            found: dict[str, Any] = {"tokens": words, "tags": tags}
            if scheme != "words":
                found["entities"] = [
                    {
                        "type": kind,
                        "text": " ".join(words[start:stop]),
                        "start": start,
                        "stop": stop,
                    }
                    for kind, start, stop in entities_in(tags, scheme)
                ]
            out.append(found)
        return out


def _tags(found: Iterable[int], positions: Iterable[int], labels: Sequence[str]) -> list[str]:
    """Tags of all words from those of words with a token."""
    left = iter(found)
    return [labels[next(left)] if position != NO_TOKEN else OUTSIDE for position in positions]


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs (rows, tokens, labels) in fp32."""
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return of_tokens(logits, batch).float()


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token (rows, tokens), 0 where there is no label."""
    import torch.nn.functional as functional

    flat = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(labels)


def _confusion(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> list[list[int]]:
    """Words by true tag and predicted tag, in the order of `labels`."""
    index = {label: i for i, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for true, predicted in pairs:
        if true in index and predicted in index:  # a word without a token may have a tag of none
            counts[index[true]][index[predicted]] += 1
    return counts


def _tag_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The same over single words: micro over all of them, and per tag."""
    from sklearn.metrics import precision_recall_fscore_support as scores

    true, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    micro = scores(true, predicted, average="micro", zero_division=0)
    tags = sorted(set(true) | set(predicted))
    each = scores(true, predicted, labels=tags, average=None, zero_division=0)
    names = ("precision", "recall", "f1")
    return {
        **{name: float(value) for name, value in zip(names, micro[:3], strict=True)},
        "f1_macro": float(each[2].mean()),
        **{
            f"{name}_per_class": dict(zip(tags, map(float, values), strict=True))
            for name, values in zip(names, each[:3], strict=True)
        },
    }
