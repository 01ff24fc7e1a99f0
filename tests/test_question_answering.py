"""Answers as spans: windows over long contexts, the place of the answer, exact match and F1."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from orchestrator.tasks import BadRow, QuestionAnswering
from orchestrator.tasks.batches import ragged

TASK = QuestionAnswering(type="question_answering", stride_tokens=4)
WORDS = [*tiny.GOOD, *tiny.BAD, "film", "book", "lunch", "walk", "song", "speech", "today"]
CONTEXT = " ".join(WORDS)
AT = CONTEXT.index("film")


@pytest.fixture(scope="module")
def tokenizer(models: tiny.Tiny) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(models.bert)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture(scope="module")
def model(models: tiny.Tiny) -> Any:
    model = AutoModelForQuestionAnswering.from_pretrained(models.bert)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def asked(answer: str, **changes: Any) -> dict[str, Any]:
    place = {"text": [answer], "answer_start": [CONTEXT.index(answer)]}
    return {"question": "the good", "context": CONTEXT, "answers": place} | changes


def windows(row: dict[str, Any], tokenizer: Any, max_length: int = 14) -> list[dict[str, Any]]:
    (encoded,) = TASK.encode([row], tokenizer, max_length, ())
    assert not isinstance(encoded, BadRow), encoded
    return TASK.pack([encoded], max_length)[0]


def arrays(rows: list[Any]) -> list[dict[str, Any]]:
    return [{name: np.asarray(row[name]) for name in TASK.features()} for row in rows]


def test_windows_cover_the_context_and_share_the_stride(tokenizer: Any) -> None:
    found = windows(asked("film"), tokenizer)
    spans = [list(zip(w["char_starts"], w["char_stops"], strict=True)) for w in found]
    texts = [[CONTEXT[a:b] for a, b in span] for span in spans]
    assert all(len(w["input_ids"]) <= 14 for w in found)
    assert [w["window"] for w in found] == list(range(len(found)))
    assert len(found) > 2
    for before, after in pairwise(texts):
        assert before[-4:] == after[:4]
    assert [*texts[0], *(word for text in texts[1:] for word in text[4:])] == WORDS
    assert [bool(w["context"]) for w in found] == [True] + [False] * (len(found) - 1)


@pytest.mark.parametrize(
    "form",
    [
        [{"text": "film", "answer_start": AT}],
        {"text": "film", "answer_start": AT},
        {"text": ["film"], "answer_start": [float(AT)]},
        json.dumps({"text": ["film"], "answer_start": [AT]}),
        json.dumps([{"text": "film", "answer_start": AT}]),
        str({"text": ["film"], "answer_start": [AT]}),
        f"{{'text': array(['film'], dtype=object), 'answer_start': array([{AT}], dtype=int32)}}",
    ],
)
def test_answers_of_every_form_are_the_same(tokenizer: Any, form: Any) -> None:
    assert windows(asked("film", answers=form), tokenizer) == windows(asked("film"), tokenizer)


def test_space_around_an_answer_is_no_part_of_it(tokenizer: Any) -> None:
    found = windows(
        asked("film", answers={"text": [" film "], "answer_start": [AT - 1]}), tokenizer
    )
    right = windows(asked("film"), tokenizer)
    assert [(w["start"], w["end"]) for w in found] == [(w["start"], w["end"]) for w in right]
    assert any(w["start"] for w in found)


@pytest.mark.parametrize(
    "form", [None, [], "[]", {"text": [], "answer_start": []}, '{"text": [], "answer_start": []}']
)
def test_no_answer_of_every_form_is_none(tokenizer: Any, form: Any) -> None:
    free = TASK.model_copy(update={"no_answer": True})
    (row,) = free.encode([asked("film", answers=form)], tokenizer, 14, ())
    assert isinstance(row, dict)
    assert {(w["start"], w["end"]) for w in row["windows"]} == {(0, 0)}
    (row,) = TASK.encode([asked("film", answers=form)], tokenizer, 14, ())
    assert isinstance(row, BadRow)
    assert "task.no_answer" in row.why


def test_a_column_that_is_missing_is_not_taken_for_no_answer(tokenizer: Any) -> None:
    free = TASK.model_copy(update={"no_answer": True})
    asking = {key: value for key, value in asked("film").items() if key != "answers"}
    (row,) = free.encode([asking], tokenizer, 14, ())
    assert isinstance(row, BadRow)
    assert "'answers' is missing" in row.why


@pytest.mark.parametrize(
    "form", ["film", 7, {"text": ["film"]}, {"text": ["film"], "answer_start": []}]
)
def test_an_answer_without_its_place_is_a_bad_row(tokenizer: Any, form: Any) -> None:
    (row,) = TASK.encode([asked("film", answers=form)], tokenizer, 14, ())
    assert isinstance(row, BadRow)


def test_an_answer_is_learned_in_every_window_that_holds_all_of_it(tokenizer: Any) -> None:
    found = windows(asked("film book"), tokenizer)
    holds = []
    for window in found:
        if window["start"]:
            tokens = window["input_ids"][window["start"] : window["end"] + 1]
            assert tokenizer.decode(tokens) == "film book"
            holds.append(window["window"])
        else:
            assert window["end"] == 0
    whole = [
        w["window"]
        for w in found
        if w["char_starts"][0] <= CONTEXT.index("film")
        and w["char_stops"][-1] >= CONTEXT.index("book") + 4
    ]
    assert holds == whole
    assert 0 < len(holds) < len(found)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": ""}, "'question' is empty"),
        ({"context": None}, "'context' is missing"),
        ({"answers": None}, "task.no_answer=true"),
        ({"answers": {"text": ["film"], "answer_start": []}}, "must hold lists"),
        ({"answers": {"text": [], "answer_start": []}}, "task.no_answer=true"),
        ({"answers": {"text": ["film"], "answer_start": [3]}}, "is not at character 3"),
        ({"answers": {"text": ["film"], "answer_start": ["3"]}}, "no text with its place"),
        ({"question": "good " * 20}, "the question takes"),
        ({"answers": {"text": [CONTEXT], "answer_start": [0]}}, "no window of 14 tokens holds"),
    ],
)
def test_a_row_that_cannot_be_asked_is_bad(tokenizer: Any, row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([asked("film") | row], tokenizer, 14, ())
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_the_loss_is_the_one_of_transformers_whatever_the_padding(
    tokenizer: Any, model: Any
) -> None:
    long, short = arrays(windows(asked("film"), tokenizer))[1], asked("great", context="so great")
    short["answers"] = {"text": ["great"], "answer_start": [3]}
    rows = [long, *arrays(windows(short, tokenizer))]
    with torch.no_grad():
        apart = []
        for row in rows:
            batch = TASK.collate([row], np.ones(1), 0)
            inputs = {n: batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")}
            places = {"start_positions": batch["start"], "end_positions": batch["end"]}
            apart.append(float(model(**inputs, **places).loss))
            assert float(TASK.loss_sum(model, batch)) == pytest.approx(apart[-1], rel=1e-5)
        together = float(TASK.loss_sum(model, TASK.collate(rows, np.ones(2), 0)))
        first = float(TASK.loss_sum(model, TASK.collate(rows, np.array([1, 0]), 0)))
    assert together == pytest.approx(sum(apart), rel=1e-5)
    assert first == pytest.approx(apart[0], rel=1e-5)


def test_the_best_span_is_in_the_context_in_order_and_short_enough(
    tokenizer: Any, model: Any
) -> None:
    task = QuestionAnswering(type="question_answering", stride_tokens=4, max_answer_tokens=3)
    rows = windows(asked("film"), tokenizer)
    batch = task.collate(arrays(rows), np.ones(len(rows)), 0)
    with torch.no_grad():
        found = task.measure(model, batch)
        outputs = model(**{n: batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")})
    for i, row in enumerate(rows):
        tokens = range(row["context_from"], row["context_from"] + len(row["char_starts"]))
        best = max(
            (float(outputs.start_logits[i, a] + outputs.end_logits[i, b]), a, b)
            for a in tokens
            for b in tokens
            if a <= b < a + 3
        )
        assert found["score"][i] == pytest.approx(best[0], rel=1e-5)
        offset = row["context_from"]
        assert (found["first"][i] + offset, found["last"][i] + offset) == best[1:]


def gathered(spans: list[tuple[int, int, float, float]], answers: list[list[str]]) -> Any:
    """Outputs for questions of two windows each over `a b c …`: (first, last, score, null score)."""
    context = "the cat sat on a mat"
    words = context.split()
    starts = np.array([context.index(w) for w in words])
    stops = starts + [len(w) for w in words]
    count = len(spans)
    return {
        "loss": np.ones(count, dtype=np.float32),
        "first": np.array([s[0] for s in spans]),
        "last": np.array([s[1] for s in spans]),
        "score": np.array([s[2] for s in spans]),
        "null_score": np.array([s[3] for s in spans]),
        "window": ragged([i % 2 for i in range(count)]),
        "context": ragged([context if i % 2 == 0 else "" for i in range(count)]),
        "answers": ragged(
            [json.dumps(answers[i // 2]) if i % 2 == 0 else "[]" for i in range(count)]
        ),
        "char_starts": ragged([starts] * count),
        "char_stops": ragged([stops] * count),
    }


def test_a_question_counts_once_by_its_best_window_and_best_answer() -> None:
    spans = [(1, 1, 1.0, 0.0), (0, 1, 5.0, 0.0), (2, 5, 3.0, 9.0), (1, 1, 1.0, 9.0)]
    got = TASK.metrics(gathered(spans, [["mat", "Cat!"], ["a mat"]]), ())
    # "the cat" is "cat" without article; "sat on a mat" shares 1 of 3 words with "mat"
    assert (got["questions"], got["exact_match"]) == (2, 0.5)
    assert got["f1"] == pytest.approx((1 + 2 * (1 / 3) / (1 + 1 / 3)) / 2)
    assert set(TASK.metric_names) <= set(got)


def test_where_no_answer_is_allowed_saying_so_can_be_right_or_wrong() -> None:
    task = QuestionAnswering(type="question_answering", no_answer=True)
    spans = [(1, 1, 1.0, 3.0), (0, 1, 2.0, 4.0), (5, 5, 3.0, 9.0), (5, 5, 3.0, 2.0)]
    got = task.metrics(gathered(spans, [[], ["mat"]]), ())
    assert (got["exact_match"], got["f1"]) == (1, 1)
    got = task.metrics(gathered(spans, [["cat"], []]), ())
    assert (got["exact_match"], got["f1"]) == (0, 0)


def test_a_prediction_reads_every_window(tokenizer: Any, model: Any) -> None:
    best_windows = set()
    for turn in range(0, len(WORDS), 4):
        context = " ".join([*WORDS[turn:], *WORDS[:turn]])
        place = {"text": ["film"], "answer_start": [context.index("film")]}
        rows = windows(asked("film", context=context, answers=place), tokenizer)
        with torch.no_grad():
            found = TASK.measure(model, TASK.collate(arrays(rows), np.ones(len(rows)), 0))
        best = int(found["score"].argmax())
        start = rows[best]["char_starts"][found["first"][best]]
        stop = rows[best]["char_stops"][found["last"][best]]
        given = json.dumps({"question": "the good", "context": context})
        (out,) = TASK.predict(model, tokenizer, [TASK.row_of(given)], 14)
        assert out["answer"] == context[start:stop]
        best_windows.add(best)
    assert len(best_windows) > 1, "answers come from the beginning and from further on"


def test_tokenizers_without_kinds_of_tokens_have_models_without(
    models: tiny.Tiny, tokenizer: Any
) -> None:
    plain = AutoTokenizer.from_pretrained(models.bert)
    for reader, has in ((tokenizer, True), (plain, False)):
        batch = TASK.collate(arrays(windows(asked("film"), reader)), np.ones(3), 0)
        assert ("token_type_ids" in batch) is has
