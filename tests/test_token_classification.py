"""Tags per word: alignment with tokens, what is learned, entities counted as seqeval does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer

from orchestrator.tasks import BadRow, TokenClassification
from orchestrator.tasks.base import IGNORED
from orchestrator.tasks.batches import ragged

TAGS = ("B-X", "B-Y", "I-X", "O")
TASK = TokenClassification(type="token_classification")


@pytest.fixture(scope="module")
def pieces(models: tiny.Tiny) -> Any:
    """Bytes in, so that most words have several tokens."""
    return AutoTokenizer.from_pretrained(models.llama)


def arrays(rows: list[Any]) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(row[name]) for name in TASK.features()} for row in rows]


def test_a_word_is_learned_at_its_first_token(pieces: Any) -> None:
    words = ["Zebra", "was", "quiet"]
    (row,) = TASK.encode([{"tokens": words, "tags": ["B-X", "O", "B-Y"]}], pieces, 64, TAGS)
    assert not isinstance(row, BadRow)
    assert len(row["input_ids"]) > 3
    starts = [*row["positions"], len(row["input_ids"])]
    texts = [pieces.decode(row["input_ids"][a:b]) for a, b in pairwise(starts)]
    assert [text.strip() for text in texts] == words
    labels = TASK.collate(arrays([row]), np.ones(1), 0)["labels"][0]
    assert labels[row["positions"]].tolist() == [0, 3, 1]
    assert int((labels != IGNORED).sum()) == row["n_targets"] == 3


@pytest.mark.parametrize("ignored", [-100, -100.0])
def test_words_tagged_minus_100_are_neither_learned_nor_counted(pieces: Any, ignored: Any) -> None:
    row = {"tokens": ["the", "great", "film"], "tags": [ignored, 1, 0]}
    assert TASK.labels_in(row["tags"]) == ["1", "0"]
    (encoded,) = TASK.encode([row], pieces, 64, ("0", "1"))
    assert isinstance(encoded, dict)
    whole = TASK.encode([{**row, "tags": [0, 1, 0]}], pieces, 64, ("0", "1"))[0]
    assert isinstance(whole, dict)
    assert encoded["input_ids"] == whole["input_ids"]
    assert encoded["positions"] == whole["positions"][1:]
    assert encoded["tags"] == [1, 0]
    assert encoded["n_targets"] == 2
    batch = TASK.collate(arrays([encoded]), np.ones(1), 0)
    assert (batch["labels"] != IGNORED).sum() == 2
    (bad,) = TASK.encode([{**row, "tags": [-100] * 3}], pieces, 64, ("0", "1"))
    assert isinstance(bad, BadRow)


def test_words_without_a_token_are_counted_as_outside_any_entity(pieces: Any) -> None:
    words, tags = ["so", "", "again", "Zebra"], ["B-X", "B-Y", "O", "B-X"]
    length = len(pieces(words[:3], is_split_into_words=True)["input_ids"])
    (row,) = TASK.encode([{"tokens": words, "tags": tags}], pieces, length, TAGS)
    assert not isinstance(row, BadRow)
    assert (row["truncated"], row["n_targets"], row["tags"]) == (1, 2, [0, 1, 3, 0])
    assert row["positions"][1] == row["positions"][3] == -1
    gathered = {
        "loss": np.ones(1),
        "predicted": ragged([np.array([0, 3])]),
        "positions": ragged([np.array(row["positions"])]),
        "tags": ragged([np.array(row["tags"])]),
    }
    got = TASK.metrics(gathered, TAGS)
    assert (got["words"], got["entities"], got["accuracy"]) == (4, 3, 0.5)
    assert (got["precision"], got["recall"]) == (1, pytest.approx(1 / 3))
    assert got["confusion"] == [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"tags": ["O"]}, "'tokens' is missing or null"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' must be a non-empty list"),
        ({"tokens": ["a"], "tags": []}, "'tags' must be a non-empty list"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 words have 2 tags"),
        ({"tokens": [1], "tags": ["O"]}, "must hold texts"),
        ({"tokens": ["a"], "tags": ["NN"]}, "unknown tag 'NN'"),
        ({"tokens": ["a"], "tags": ["I-Z"]}, "unknown tag 'I-Z'"),
        ({"tokens": [""], "tags": ["O"]}, "no word has a token"),
    ],
)
def test_a_row_that_cannot_be_tagged_is_bad(pieces: Any, row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([row], pieces, 64, TAGS)
    assert isinstance(bad, BadRow)
    assert why in bad.why


def scored(true: list[list[str]], predicted: list[list[str]], entities: bool) -> dict[str, Any]:
    task = TokenClassification(type="token_classification", entities=entities)
    tags = sorted({t for row in (*true, *predicted) for t in row})

    def ids(rows: list[list[str]]) -> np.ndarray:
        return ragged([np.array([tags.index(t) for t in row]) for row in rows])

    gathered = {
        "loss": np.ones(len(true)),
        "predicted": ids(predicted),
        "tags": ids(true),
        "positions": ragged([np.arange(len(row)) for row in true]),
    }
    return task.metrics(gathered, tuple(tags))


def test_entities_count_only_where_both_ends_and_the_kind_are_right() -> None:
    true = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"], ["O", "O"]]
    predicted = [["B-X", "O", "O", "B-Y"], ["O", "B-X"], ["B-Y", "O"]]
    got = scored(true, predicted, entities=True)
    assert got["f1"] == pytest.approx(f1_score(true, predicted))
    # 3 entities, 4 predicted, 2 right
    assert (got["precision"], got["recall"]) == (0.5, pytest.approx(2 / 3))
    assert got["f1_per_class"] == {"X": 0.5, "Y": pytest.approx(2 / 3)}
    assert got["f1_macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got["accuracy"] == pytest.approx(6 / 8)


def test_metrics_without_any_entity_are_zero_and_no_error() -> None:
    got = scored([["O", "O"]], [["O", "O"]], entities=True)
    assert (got["f1"], got["accuracy"]) == (0, 1)
    assert set(TASK.metric_names) <= set(got)


def test_tags_that_stand_for_themselves_are_counted_by_word() -> None:
    got = scored([["NN", "VB", "NN"]], [["NN", "NN", "NN"]], entities=False)
    assert got["f1"] == got["accuracy"] == pytest.approx(2 / 3)
    assert got["recall_per_class"] == {"NN": 1, "VB": 0}
    assert set(TASK.metric_names) <= set(got)


def test_rows_of_weight_zero_and_padding_change_no_loss(models: tiny.Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.bert)
    model = AutoModelForTokenClassification.from_pretrained(
        models.bert, ignore_mismatched_sizes=True, **TASK.config_overrides(TAGS)
    ).eval()
    raw = [
        {"tokens": ["the", "film"], "tags": ["O", "B-X"]},
        {"tokens": ["my", "lunch", "was", "great"], "tags": ["B-Y", "O", "O", "O"]},
    ]
    rows = arrays(TASK.encode(raw, tokenizer, 64, TAGS))
    with torch.no_grad():
        alone = [TASK.loss_sum(model, TASK.collate([r], np.ones(1), 0)) for r in rows]
        both = TASK.loss_sum(model, TASK.collate(rows, np.ones(2), 0))
        first = TASK.collate(rows, np.array([1, 0]), 0)
        assert float(both) == pytest.approx(float(sum(alone)), rel=1e-5)
        assert float(TASK.loss_sum(model, first)) == pytest.approx(float(alone[0]), rel=1e-5)
        measured = TASK.measure(model, TASK.collate(rows, np.ones(2), 0))
        predicted = TASK.predict(model, tokenizer, raw, 64)
    assert measured["loss"] == pytest.approx([float(one) for one in alone], rel=1e-5)
    for found, one in zip(measured["predicted"], predicted, strict=True):
        assert [TAGS[i] for i in found] == one["tags"]


def test_a_text_is_cut_into_words_and_its_entities_are_named(
    models: tiny.Tiny,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.bert)
    model = AutoModelForTokenClassification.from_pretrained(
        models.bert, ignore_mismatched_sizes=True, **TASK.config_overrides(TAGS)
    ).eval()
    with torch.no_grad():  # whatever it reads: the beginning of an X
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    (out,) = TASK.predict(model, tokenizer, [{"tokens": "The film, again"}], 4)
    assert out["tokens"] == ["The", "film", ",", "again"]
    assert out["tags"] == ["B-X", "B-X", "O", "O"], "two words fit, the others cannot be tagged"
    assert [e["text"] for e in out["entities"]] == ["The", "film"]
