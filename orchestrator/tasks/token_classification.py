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
    label_problems,
    of_tokens,
    pad,
    ragged,
    token_scores,
    tokens_and_mask,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

OUTSIDE = "O"
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
NO_TOKEN = -1
"""Stands for the position of a word without a token: one cut off, or of which nothing is left."""
WORDS = re.compile(r"\w+|[^\w\s]")
"""How a text is cut into words where none are given: runs of letters and digits, single marks."""


class TokenClassification(Task):
    """One tag per word, learnt and predicted at the word's first token."""

    type: Literal["token_classification"]
    tokens_column: str = "tokens"
    """Column with the words of a text, as a list."""
    tags_column: str = "tags"
    """Column with the tags, one per word, as a list."""
    entities: bool = True
    """Tags spell entities (`B-NAME`, `I-NAME`, `O`, or IOBES), which are counted as seqeval does. False:
    each tag stands for itself, as parts of speech do, and words are counted."""
    labels: tuple[str, ...] | None = None
    """The tag set, in the order of the model's outputs. Default: all tags of the training rows, sorted."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "f1",
        "precision",
        "recall",
        "f1_macro",
        "accuracy",
        "loss",
    )
    default_metric: ClassVar[str] = "f1"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    has_scores: ClassVar[bool] = True
    label_feature: ClassVar[str] = "tags"
    soft_targets: ClassVar[SoftTargets | None] = "classes"
    pipeline_tag: ClassVar[str] = "token-classification"
    peft_task: ClassVar[str] = "TOKEN_CLS"
    labelled_head: ClassVar[bool] = True
    kept_features: ClassVar[tuple[str, ...]] = ("positions", "tags")

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from label_problems(self.labels)
        odd = [tag for tag in self.labels or () if not ENTITY_TAG.fullmatch(tag)]
        if self.entities and odd:
            yield Problem("task.labels", *NO_ENTITY_TAG, odd[0])

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.tokens_column, self.tags_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.tokens_column,)

    @property
    def label_source(self) -> str | None:
        return self.tags_column if self.labels is None else None

    def labels_in(self, value: Any) -> Iterable[str]:
        return map(str, value) if isinstance(value, list | tuple) else ()

    def features(self) -> dict[str, FeatureKind]:
        return {"input_ids": "ints", "positions": "ints", "tags": "ints"}

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out: list[EncodedRow | BadRow] = []
        for row in rows:
            if bad := self._problem(row, index):
                out.append(bad)
                continue
            encoded = _aligned(row[self.tokens_column], tokenizer, max_length)
            encoded["tags"] = [index[str(tag)] for tag in row[self.tags_column]]
            if encoded["n_targets"] == 0:
                out.append(BadRow(f"no word has a token within {max_length} tokens"))
            else:
                out.append(encoded)
        return out

    def _problem(self, row: RawRow, index: Mapping[str, int]) -> BadRow | None:
        words, tags = row.get(self.tokens_column), row.get(self.tags_column)
        for column, value in ((self.tokens_column, words), (self.tags_column, tags)):
            if not isinstance(value, list | tuple) or not value:
                return BadRow(f"column {column!r} must be a non-empty list, got {value!r}")
        assert words is not None
        assert tags is not None
        if len(words) != len(tags):
            return BadRow(f"{len(words)} words have {len(tags)} tags")
        if not all(isinstance(word, str) for word in words):
            return BadRow(f"column {self.tokens_column!r} must hold texts")
        for tag in map(str, tags):
            if self.entities and not ENTITY_TAG.fullmatch(tag):
                return BadRow(f"tag {tag!r}: {NO_ENTITY_TAG[0]}; {NO_ENTITY_TAG[1]}")
            if tag not in index:
                return BadRow(f"unknown tag {tag!r}; the job knows: {', '.join(list(index)[:10])}")
        return None

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
        words_with_loss = sum(len(found) for found in gathered["predicted"])
        return {
            "loss": float(gathered["loss"].sum()) / max(words_with_loss, 1),
            "accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1),
            "words": len(pairs),
            "confusion": _confusion(pairs, labels),
            **(_entity_scores(true, predicted) if self.entities else _tag_scores(pairs)),
        }

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import numpy as np
        import torch

        given = [row[self.tokens_column] for row in rows]
        texts = [WORDS.findall(one) if isinstance(one, str) else list(one) for one in given]
        encoded = [_aligned(words, tokenizer, max_length) for words in texts]
        ids = [np.array(one["input_ids"]) for one in encoded]
        batch = tokens_and_mask(ids, tokenizer.pad_token_id or 0)
        with torch.no_grad():
            logits = _logits(model, {name: t.to(model.device) for name, t in batch.items()})
        names = [name for _, name in sorted(model.config.id2label.items())]
        out = []
        for words, one, of_row in zip(texts, encoded, logits.argmax(-1).cpu().numpy(), strict=True):
            positions = np.array(one["positions"], dtype=np.int64)
            tags = _tags(of_row[positions[positions != NO_TOKEN]], positions, names)
            found: dict[str, Any] = {"tokens": words, "tags": tags}
            if self.entities:
                found["entities"] = _entities(words, tags)
            out.append(found)
        return out


NO_ENTITY_TAG = ("is no entity tag (B-NAME, I-NAME, O)", "set task.entities=false for other tags")


def _aligned(words: Sequence[str], tokenizer: Any, max_length: int) -> EncodedRow:
    """Token ids of the words, and the position of each word's first token."""
    encoded = tokenizer(
        list(words), is_split_into_words=True, truncation=True, max_length=max_length
    )
    positions = [NO_TOKEN] * len(words)
    for position, word in reversed(list(enumerate(encoded.word_ids()))):
        if word is not None:
            positions[word] = position
    return {
        "input_ids": encoded["input_ids"],
        "positions": positions,
        "n_targets": sum(position != NO_TOKEN for position in positions),
        "truncated": int(bool(encoded.encodings[0].overflowing)),
    }


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


def _entity_scores(true: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Precision, recall and F1 over whole entities by seqeval's default, as conlleval counts."""
    from seqeval.metrics import classification_report

    if not any(tag != OUTSIDE for tags in (*true, *predicted) for tag in tags):
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0, "f1_macro": 0.0, "entities": 0}
    report: Any = classification_report(true, predicted, output_dict=True, zero_division=0)
    micro, macro = report.pop("micro avg"), report.pop("macro avg")
    report.pop("weighted avg")
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    return {
        **{name: float(micro[theirs]) for name, theirs in names.items()},
        "f1_macro": float(macro["f1-score"]),
        "entities": int(micro["support"]),
        **{
            f"{name}_per_class": {kind: float(of[theirs]) for kind, of in report.items()}
            for name, theirs in names.items()
        },
    }


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


def _entities(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """The entities that tags spell; `start` and `stop` count words."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        {"type": kind, "text": " ".join(words[start : last + 1]), "start": start, "stop": last + 1}
        for kind, start, last in get_entities(list(tags))
    ]
