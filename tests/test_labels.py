"""Labels as people's files hold them: which are labels, their order, their names, their numbers."""

from __future__ import annotations

import datetime
import math
import random
from typing import Any

import pytest
from seqeval.metrics import f1_score, precision_score
from seqeval.scheme import BILOU, IOBES

from orchestrator.tasks import (
    BadRow,
    MultiLabelClassification,
    TextClassification,
    TokenClassification,
)
from orchestrator.tasks.labels import (
    label_name,
    label_number,
    label_warnings,
    list_in,
    look_like_measurements,
    printable,
    shown,
    sorted_labels,
)
from orchestrator.tasks.tags import Entity, entities_in, entity_scores, scheme_of

NAMES = ("bad", "good")
INDEX = {"bad": 0, "good": 1}
SINGLE = TextClassification(type="text_classification", labels=NAMES)
OPEN = TextClassification(type="text_classification")
MULTI = MultiLabelClassification(type="multi_label_classification", labels=("a", "b", "c"))
ABC = {"a": 0, "b": 1, "c": 2}


# --- single labels


@pytest.mark.parametrize(
    ("value", "number"),
    [("bad", 0), (1, 1), ("1", 1), (1.0, 1), ("0.0", 0), (True, 1), (False, 0)],
)
def test_integers_index_the_given_names(value: Any, number: int) -> None:
    assert SINGLE.target(value, INDEX) == number


@pytest.mark.parametrize("value", [2, -1, "7", 0.5, "Good", "god", 10**30])
def test_what_indexes_no_name_is_a_bad_row(value: Any) -> None:
    assert isinstance(SINGLE.target(value, INDEX), BadRow)


def test_names_that_are_integers_are_names_and_no_positions() -> None:
    index = {"1": 0, "2": 1}
    task = TextClassification(type="text_classification", labels=("1", "2"))
    assert [task.target(v, index) for v in (1, "2", 2.0, "1.0")] == [0, 1, 1, 0]
    assert isinstance(task.target(0, index), BadRow)


def test_without_given_names_an_integer_is_no_position() -> None:
    assert isinstance(OPEN.target(0, INDEX), BadRow)


def test_an_unknown_label_is_told_with_the_nearest_one() -> None:
    for value in ("Good ", "gooood"):
        bad = SINGLE.target(value, INDEX)
        assert isinstance(bad, BadRow)
        assert "the nearest is 'good'" in bad.why


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, "nan", "NaN"])
def test_nothing_and_nan_are_missing(value: Any) -> None:
    for found in (SINGLE.target(value, INDEX), OPEN.labels_in(value)):
        assert isinstance(found, BadRow)
        assert "missing" in found.why


@pytest.mark.parametrize(
    "value",
    [["a"], {"a": 1}, datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), b"a", math.inf],
)
def test_lists_objects_times_and_bytes_are_no_labels(value: Any) -> None:
    assert isinstance(label_name(value), BadRow)
    bad = OPEN.labels_in(value)
    assert isinstance(bad, BadRow)
    assert "'label'" in bad.why


def test_floats_that_are_whole_are_integers() -> None:
    assert [label_name(v) for v in (1.0, 0.0, -3.0, 2, True, 0.5)] == [
        "1", "0", "-3", "2", "True", "0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "1", "-2"], ("-2", "1", "9", "10")),
        (["1.0", "0.0", "10.0"], ("0", "1", "10")),
        (["1", "1.0", "2"], ("1", "2")),
        (["0.5", "10", "2"], ("0.5", "2", "10")),
        (["1.0", "1.1"], ("1.0", "1.1")),
        (["b", "10", "9"], ("10", "9", "b")),
    ],
)
def test_numbers_are_sorted_by_value(labels: list[str], order: tuple[str, ...]) -> None:
    assert sorted_labels(labels) == order


def test_text_numbers_of_pandas_find_the_integers_they_are() -> None:
    index = {n: i for i, n in enumerate(sorted_labels(["1.0", "0.0"]))}
    assert [label_number(v, index) for v in ("1.0", "0.0", 1, 1.0)] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (["good", "Good"], "case"),
        (["good", "good ", "bad"], "space"),
        (["caf\u00e9", "cafe\u0301"], "Unicode form"),
        (["a\x1b[31m"], "control"),
        (["a\u202eb"], "control"),
    ],
)
def test_labels_that_look_alike_are_warned_of(labels: list[str], word: str) -> None:
    (warning,) = label_warnings(labels)
    assert word in warning
    assert warning.isprintable()
    assert label_warnings(["good", "bad"]) == []


def test_nothing_unprintable_is_shown() -> None:
    assert shown("\x1b[31m") == "'\\x1b[31m'"
    assert printable("a\x1b]0;x\x07é日") == "a\\x1b]0;x\\x07é日"
    assert len(shown("x" * 1000)) < 100


def test_values_with_fractions_look_like_measurements_and_classes_do_not() -> None:
    assert look_like_measurements([str(i / 7) for i in range(50)])
    assert not look_like_measurements([str(i) for i in range(50)])
    assert not look_like_measurements(["0.5", "1.0"])


# --- lists of labels


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("('a', 'b')", ["a", "b"]),
        ("[1 2 0]", [1, 2, 0]),
        ("[0. 1.]", [0.0, 1.0]),
        ("[]", []),
        ("['it\\'s', \"b\"]", ["it's", "b"]),
        ("a, b", None),
        ("[a, b]", None),
        ("{'a': 1}", None),
        ("[" * 5000 + "]" * 5000, None),
    ],
)
def test_lists_written_as_text_are_lists(text: str, items: list[Any] | None) -> None:
    assert list_in(text) == items


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (["a", "c"], [1, 0, 1]),
        ("a, c", [1, 0, 1]),
        ("['a', 'c']", [1, 0, 1]),
        ('["c"]', [0, 0, 1]),
        ([0, 2], [1, 0, 1]),
        ("[0, 2]", [1, 0, 1]),
        ("2", [0, 0, 1]),
        ([0, 1, 1], [0, 1, 1]),
        ([1.0, 0.0, 0.0], [1, 0, 0]),
        ("", [0, 0, 0]),
        ([], [0, 0, 0]),
        (["a", None, math.nan], [1, 0, 0]),
    ],
)
def test_rows_of_several_labels(value: Any, target: list[int]) -> None:
    assert MULTI.target(value, ABC) == target


@pytest.mark.parametrize("value", [["z"], [3], [["a"]], [{"a": 1}], None, math.nan, 1.5])
def test_rows_whose_labels_are_none(value: Any) -> None:
    assert isinstance(MULTI.target(value, ABC), BadRow)


@pytest.mark.parametrize("value", [[0, 1, 0], "[1, 1]", [0.0, 0.0, 1.0], [True, False, True]])
def test_a_zero_or_one_per_label_needs_the_labels_names(value: Any) -> None:
    without = MultiLabelClassification(type="multi_label_classification")
    found = without.labels_in(value)
    assert isinstance(found, BadRow)
    assert "task.labels" in found.why
    assert without.labels_in([0, 1]) == ["0", "1"]
    assert without.labels_in(["a", "a"]) == ["a", "a"]


# --- tags


def test_integers_and_lists_as_text_are_tags() -> None:
    task = TokenClassification(type="token_classification", labels=("O", "B-X", "I-X"))
    index = {"O": 0, "B-X": 1, "I-X": 2}
    for tags in ([1, 2, 0], "[1, 2, 0]", "['B-X' 'I-X' 'O']", "[1 2 0]", [1.0, 2.0, 0.0]):
        row = {"tokens": "['great', 'film', 'today']", "tags": tags}
        assert task._words_and_tags(row, index) == (["great", "film", "today"], [1, 2, 0])
    for tags in ([3, 0, 0], [None, 0, 0], [[1], 0, 0], "1 2 0"):
        row = {"tokens": ["great", "film", "today"], "tags": tags}
        assert isinstance(task._words_and_tags(row, index), BadRow)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-X", "I-X"], "IOB"),
        (["O", "I-X"], "IOB"),
        (["O", "B-X", "I-X", "E-X", "S-X"], "IOBES"),
        (["O", "B-X", "I-X", "L-X", "U-X"], "BILOU"),
        (["O", "U-X", "B-X", "L-X"], "BILOU"),
        (["O", "PER", "LOC"], "IO"),
        (["O", "E-mail", "phone"], "IO"),
        (["NN", "VB"], "words"),
    ],
)
def test_the_scheme_is_seen_in_the_tag_set(labels: list[str], scheme: str) -> None:
    assert scheme_of(labels) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "found"),
    [
        ("I-X I-X B-X O I-Y", "IOB", [("X", 0, 2), ("X", 2, 3), ("Y", 4, 5)]),
        ("B-X I-X O B-X B-X", "IOB", [("X", 0, 2), ("X", 3, 4), ("X", 4, 5)]),
        ("B-X E-X S-X O B-Y I-Y E-Y", "IOBES", [("X", 0, 2), ("X", 2, 3), ("Y", 4, 7)]),
        ("B-X L-X U-X O B-Y I-Y L-Y", "BILOU", [("X", 0, 2), ("X", 2, 3), ("Y", 4, 7)]),
        ("B-X I-X O U-Y", "BILOU", [("Y", 3, 4)]),
        ("PER PER O LOC PER", "IO", [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]),
        ("NN NN VB", "words", []),
    ],
)
def test_entities_by_scheme(tags: str, scheme: Any, found: list[tuple[str, int, int]]) -> None:
    assert entities_in(tags.split(), scheme) == [Entity(*one) for one in found]


def test_scores_of_bilou_are_those_counted_by_hand() -> None:
    true = [["B-X", "L-X", "O", "U-Y"], ["U-X", "O"]]
    predicted = [["B-X", "L-X", "O", "U-X"], ["B-X", "O"]]
    got = entity_scores(true, predicted, "BILOU")
    # 3 entities; 2 predicted (the B without an end is none), 1 right
    assert (got["precision"], got["recall"], got["entities"]) == (1 / 2, 1 / 3, 3)
    assert got["f1"] == pytest.approx(0.4)
    assert got["f1_per_class"] == {"X": 0.5, "Y": 0.0}


@pytest.mark.parametrize("scheme", ["IOB", "IOBES", "BILOU"])
def test_scores_equal_seqeval_on_random_tags(scheme: Any) -> None:
    prefixes = {"IOB": "BI", "IOBES": "BIES", "BILOU": "BILU"}[scheme]
    tags = ["O", *(f"{p}-{kind}" for p in prefixes for kind in "XY")]
    rng = random.Random(1)
    how: dict[str, Any] = {} if scheme == "IOB" else {"mode": "strict"}
    how |= {"scheme": {"IOBES": IOBES, "BILOU": BILOU}[scheme]} if how else {}
    for _ in range(200):
        true, predicted = (
            [[rng.choice(tags) for _ in range(rng.randint(1, 8))] for _ in range(3)]
            for _ in range(2)
        )
        predicted = [[*p, *["O"] * len(t)][: len(t)] for p, t in zip(predicted, true, strict=True)]
        got = entity_scores(true, predicted, scheme)
        assert got["f1"] == pytest.approx(f1_score(true, predicted, zero_division=0, **how))
        wanted = precision_score(true, predicted, zero_division=0, **how)
        assert got["precision"] == pytest.approx(wanted)
