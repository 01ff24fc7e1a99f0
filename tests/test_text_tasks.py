"""Tasks of one text and one head: several labels, or a number; and whose head it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from sklearn import metrics as sk
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from orchestrator.errors import DataError, OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.spec import JobSpec
from orchestrator.tasks import BadRow, MultiLabelClassification, TextRegression

LABELS = ("dull", "long", "new")
MULTI = MultiLabelClassification(type="multi_label_classification", labels=LABELS)
RATE = TextRegression(type="text_regression")


@pytest.fixture(scope="module")
def words(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.bert)


def arrays(rows: list[Any]) -> list[dict[str, np.ndarray]]:
    return [{n: np.asarray(row[n]) for n in ("input_ids", "label")} for row in rows]


# --- several labels


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (["new", "dull"], [1, 0, 1]),
        ("new, dull", [1, 0, 1]),
        ([], [0, 0, 0]),
        ("", [0, 0, 0]),
    ],
)
def test_labels_come_as_a_list_or_as_one_text(words: Any, value: Any, held: list[int]) -> None:
    (row,) = MULTI.encode([{"text": "the film", "labels": value}], words, 64, LABELS)
    assert row["label"] == held  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "why"), [(None, "must be a list"), (3, "must be a list"), (["odd"], "unknown label")]
)
def test_a_row_without_usable_labels_is_bad(words: Any, value: Any, why: str) -> None:
    (bad,) = MULTI.encode([{"text": "the film", "labels": value}], words, 64, LABELS)
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_multi_label_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 2, (300, 3)), rng.integers(0, 2, (300, 3))
    label[:100], label[:, 2], predicted[:100] = predicted[:100], 0, predicted[:100]
    got = MULTI.metrics({"loss": np.ones(300), "predicted": predicted, "label": label}, LABELS)
    scores = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}
    for name, score in scores.items():
        for average in ("micro", "macro"):
            wanted = score(label, predicted, average=average, zero_division=0)
            assert got[f"{name}_{average}"] == pytest.approx(wanted), (name, average)
        each = score(label, predicted, average=None, zero_division=0)
        assert list(got[f"{name}_per_class"].values()) == pytest.approx(list(each))
    assert got["exact_match"] == pytest.approx(sk.accuracy_score(label, predicted))
    theirs = sk.multilabel_confusion_matrix(label, predicted)[:, ::-1, ::-1].tolist()
    assert list(got["confusion_per_label"].values()) == theirs
    assert set(MULTI.metric_names) <= set(got)


def test_multi_label_loss_is_the_one_of_transformers(words: Any, models: tiny.Tiny) -> None:
    raw = [
        {"text": "the film was dull", "labels": ["dull"]},
        {"text": "my lunch", "labels": "new,long"},
    ]
    rows = MULTI.encode(raw, words, 64, LABELS)
    model = AutoModelForSequenceClassification.from_pretrained(
        models.bert, ignore_mismatched_sizes=True, **MULTI.config_overrides(LABELS)
    ).eval()
    batch = MULTI.collate(arrays(rows), np.ones(2), 0)
    with torch.no_grad():
        loss = MULTI.loss_sum(model, batch) / 2
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        theirs = model(**inputs, labels=batch["labels"].float()).loss
        first, _ = MULTI.predict(model, words, raw, 64)
        wanted = model(**inputs).logits[0].sigmoid()
    assert float(loss) == pytest.approx(float(theirs), rel=1e-6)
    assert list(first["scores"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert first["labels"] == [n for n, p in zip(LABELS, wanted, strict=True) if p > 0.5]


# --- a number


@pytest.mark.parametrize("value", [None, "", "high", True, "nan", float("inf")])
def test_a_target_that_is_no_finite_number_is_bad(words: Any, value: Any) -> None:
    (bad,) = RATE.encode([{"text": "the film", "value": value}], words, 64, ())
    assert isinstance(bad, BadRow)
    assert "must be a finite number" in bad.why


def test_regression_metrics_agree_with_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(size=200).round(1)  # with ties
    predicted = value + rng.normal(size=200)
    got = RATE.metrics({"predicted": predicted, "value": value}, ())
    assert got["mse"] == pytest.approx(sk.mean_squared_error(value, predicted))
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(value, predicted))
    assert got["r2"] == pytest.approx(sk.r2_score(value, predicted))
    assert got["pearson"] == pytest.approx(stats.pearsonr(value, predicted).statistic)
    assert got["spearman"] == pytest.approx(stats.spearmanr(value, predicted).statistic, rel=1e-5)
    assert set(RATE.metric_names) <= set(got)


@pytest.mark.parametrize("value", [[1.0], [2.0, 2.0]])
def test_correlation_without_variation_is_zero_and_no_nan(value: list[float]) -> None:
    gathered = {"predicted": np.zeros(len(value)), "value": np.array(value)}
    got = RATE.metrics(gathered, ())
    assert (got["pearson"], got["spearman"], got["r2"]) == (0, 0, 0)


def test_regression_predicts_the_number_its_loss_is_taken_of(words: Any, models: tiny.Tiny) -> None:
    raw = [{"text": "the film was dull", "value": "-1.5"}, {"text": "my lunch", "value": 2}]
    rows = RATE.encode(raw, words, 64, ())
    model = AutoModelForSequenceClassification.from_pretrained(
        models.bert, ignore_mismatched_sizes=True, **RATE.config_overrides(())
    ).eval()
    batch = RATE.collate(arrays(rows), np.array([1, 0]), 0)
    with torch.no_grad():
        loss = float(RATE.loss_sum(model, batch))
    first, _ = RATE.predict(model, words, raw, 64)
    assert loss == pytest.approx((first["value"] + 1.5) ** 2, rel=1e-4)


def test_lower_errors_and_higher_correlations_are_better() -> None:
    better = {name: RATE.metric(name).maximize for name in RATE.metric_names}
    higher = {name for name, up in better.items() if up}
    assert higher == {"pearson", "spearman", "r2"}


# --- what a prediction is asked for


def test_a_line_is_the_one_column_that_a_task_predicts_from() -> None:
    assert RATE.row_of('{"no": "object"}') == {"text": '{"no": "object"}'}
    with pytest.raises(DataError, match="an object with 'text'"):
        RATE.row_of({"title": "x"})


# --- whose head


@pytest.fixture
def trained_head(models: tiny.Tiny, tmp_path: Path) -> Path:
    """A model whose head knows the labels `bad` and `Good`, in this order."""
    named = {"id2label": {0: "bad", 1: "Good"}, "label2id": {"bad": 0, "Good": 1}}
    config = BertConfig.from_pretrained(models.bert, **named)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(models.bert).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def head_of(
    folder: Path, labels: tuple[str, ...], tmp_path: Path, kind: str = "text_classification"
) -> Any:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.labeled(2))
    task = {"type": kind, "labels": labels}
    spec: JobSpec = tiny.job(folder, rows, tmp_path, task=task)
    model: Any = build_model(spec, labels)
    return model.classifier.weight.detach()


def test_a_head_for_the_same_labels_is_kept(trained_head: Path, tmp_path: Path) -> None:
    before = AutoModelForSequenceClassification.from_pretrained(trained_head).classifier.weight
    assert head_of(trained_head, ("bad", "good"), tmp_path).equal(before)


def test_a_head_for_the_same_labels_in_another_order_is_refused(
    trained_head: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrchestratorError, match=r"another order. Set task.labels=\[bad, Good\]"):
        head_of(trained_head, ("good", "bad"), tmp_path)


def test_a_head_for_as_many_other_labels_is_drawn_anew(trained_head: Path, tmp_path: Path) -> None:
    before = AutoModelForSequenceClassification.from_pretrained(trained_head).classifier.weight
    after = head_of(trained_head, ("new", "old"), tmp_path)
    assert after.shape == before.shape
    assert not after.equal(before)
    assert after.equal(head_of(trained_head, ("new", "old"), tmp_path))


def test_a_head_of_another_kind_is_drawn_anew(trained_head: Path, tmp_path: Path) -> None:
    before = AutoModelForSequenceClassification.from_pretrained(trained_head).classifier.weight
    after = head_of(trained_head, ("B-x", "O"), tmp_path, "token_classification")
    assert after.shape == before.shape
    assert not after.equal(before)
