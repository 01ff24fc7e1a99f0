"""Pairs of texts: encoded together, told apart by token types, the same in training and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TextClassificationPipeline,
)

from orchestrator.tasks import (
    BadRow,
    MultiLabelClassification,
    TextClassification,
    TextRegression,
)

LABELS = ("no", "yes")
PAIR: dict[str, Any] = {"text_column": "a", "text_pair_column": "b"}
TASK = TextClassification(type="text_classification", **PAIR)
ROWS = [
    {"a": "the film was great", "b": "my lunch", "label": "yes"},
    {"a": "dull", "b": "the film was good", "label": "no"},
]


@pytest.fixture
def tokenizer(models: tiny.Tiny) -> Any:
    made = AutoTokenizer.from_pretrained(models.bert)
    TASK.adapt_tokenizer(made, AutoConfig.from_pretrained(models.bert))
    return made


def arrays(rows: list[Any]) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(row[name]) for name in TASK.features()} for row in rows]


def test_pairs_are_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    for row, encoded in zip(ROWS, TASK.encode(ROWS, tokenizer, 64, LABELS), strict=True):
        assert not isinstance(encoded, BadRow)
        wanted = tokenizer(row["a"], row["b"], return_token_type_ids=True)
        assert encoded["input_ids"] == wanted["input_ids"]
        assert encoded["token_type_ids"] == wanted["token_type_ids"]
        assert set(encoded["token_type_ids"]) == {0, 1}


def test_the_longer_text_is_cut_first(tokenizer: Any) -> None:
    (row,) = TASK.encode(
        [{"a": "the film " * 20, "b": "my lunch", "label": "no"}], tokenizer, 12, LABELS
    )
    assert not isinstance(row, BadRow)
    assert (row["truncated"], len(row["input_ids"])) == (1, 12)
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text.endswith("my lunch")


@pytest.mark.parametrize("row", [{"a": "x", "label": "no"}, {"a": "x", "b": " ", "label": "no"}])
def test_half_a_pair_is_a_bad_row(tokenizer: Any, row: dict[str, Any]) -> None:
    (bad,) = TASK.encode([row], tokenizer, 64, LABELS)
    assert isinstance(bad, BadRow)
    assert "'b'" in bad.why


def test_training_prediction_and_a_plain_pipeline_agree(
    models: tiny.Tiny, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        models.bert, **TASK.config_overrides(LABELS)
    ).eval()
    with torch.no_grad():  # so that types matter
        model.bert.embeddings.token_type_embeddings.weight.normal_(std=2.0)
    batch = TASK.collate(arrays(TASK.encode(ROWS, tokenizer, 64, LABELS)), np.ones(2), 0)
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        trained = TASK.scores(model, batch).logits.softmax(-1)
        predicted = TASK.predict(model, tokenizer, ROWS, 64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipeline = TextClassificationPipeline(
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    plain = pipeline([{"text": row["a"], "text_pair": row["b"]} for row in ROWS])
    for one, scores, theirs in zip(predicted, trained, plain, strict=True):
        assert one["score"] == pytest.approx(float(scores.max()), abs=1e-5)
        assert theirs["score"] == pytest.approx(one["score"], abs=1e-5)
        assert theirs["label"] == one["label"]
    assert [(p["text"], p["text_pair"]) for p in predicted] == [(r["a"], r["b"]) for r in ROWS]


@pytest.mark.parametrize(
    ("kind", "config", "has"),
    [
        ("bert", {}, True),
        ("roberta", {"type_vocab_size": 1}, False),
        ("distilbert", {}, False),
        ("deberta-v2", {"type_vocab_size": 0}, False),
    ],
)
def test_token_types_are_given_where_the_model_has_them(
    models: tiny.Tiny, kind: str, config: dict[str, Any], has: bool
) -> None:
    made = AutoTokenizer.from_pretrained(models.bert)
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    TASK.adapt_tokenizer(made, AutoConfig.for_model(kind, **config))
    rows = arrays(TASK.encode(ROWS, made, 64, LABELS))
    assert ("token_type_ids" in TASK.collate(rows, np.ones(2), 0)) is has


def test_several_labels_and_numbers_take_pairs_too(tokenizer: Any) -> None:
    multi = MultiLabelClassification(type="multi_label_classification", **PAIR)
    (row,) = multi.encode([{**ROWS[0], "labels": ["yes"]}], tokenizer, 64, LABELS)
    assert not isinstance(row, BadRow)
    assert (row["label"], len(set(row["token_type_ids"]))) == ([0, 1], 2)
    number = TextRegression(type="text_regression", **PAIR)
    (row,) = number.encode([{**ROWS[0], "value": 2.5}], tokenizer, 64, ())
    assert not isinstance(row, BadRow)
    assert (row["label"], len(set(row["token_type_ids"]))) == (2.5, 2)
