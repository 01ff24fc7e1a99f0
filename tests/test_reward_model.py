"""Reward models: pairs of answers, the loss, scores of single answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.tasks import BadRow, RewardModel

TASK = RewardModel(type="reward_model")
ROWS = [
    {"prompt": "the film was", "chosen": " great again", "rejected": " dull"},
    {"prompt": "so", "chosen": " good", "rejected": " not good at all today", "margin": 0.5},
]


@pytest.fixture(scope="module")
def tokenizer(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.llama)


@pytest.fixture(scope="module")
def model(models: tiny.Tiny, tokenizer: Any) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        models.llama, num_labels=1, pad_token_id=tokenizer.pad_token_id or 0, dtype=torch.float32
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def arrays(task: RewardModel, tokenizer: Any) -> list[dict[str, Any]]:
    encoded: list[Any] = task.encode(ROWS, tokenizer, 64, ())
    return [{name: np.asarray(row[name]) for name in task.features()} for row in encoded]


def reward(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The model's output for one answer, alone and without padding."""
    ids = [*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_the_loss_is_that_of_bradley_and_terry_with_the_margin(tokenizer: Any, model: Any) -> None:
    centered = RewardModel(type="reward_model", center_coefficient=0.1)
    chosen, rejected = (
        [reward(model, tokenizer, row["prompt"], row[side]) for row in ROWS]
        for side in ("chosen", "rejected")
    )
    losses = [
        math.log1p(math.exp(-(c - r - margin)))
        for c, r, margin in zip(chosen, rejected, (0, 0.5), strict=True)
    ]
    with_center = [
        loss + 0.1 * (c + r) ** 2 for loss, c, r in zip(losses, chosen, rejected, strict=True)
    ]
    rows = arrays(TASK, tokenizer)
    with torch.no_grad():
        batch = TASK.collate(rows, np.ones(2), 0)
        measured = TASK.measure(model, batch)
        second = float(TASK.loss_sum(model, TASK.collate(rows, np.array([0, 1]), 0)))
        total = float(centered.loss_sum(model, batch))
    assert measured["loss"] == pytest.approx(losses, rel=1e-4)
    assert measured["chosen"] == pytest.approx(chosen, rel=1e-4)
    assert measured["rejected"] == pytest.approx(rejected, rel=1e-4)
    assert second == pytest.approx(losses[1], rel=1e-4)
    assert total == pytest.approx(sum(with_center), rel=1e-4)
    assert set(TASK.metric_names) <= set(TASK.metrics(measured, ()))


def test_an_answer_is_scored_alone_as_in_its_pair(tokenizer: Any, model: Any) -> None:
    with torch.no_grad():
        wanted = TASK.measure(model, TASK.collate(arrays(TASK, tokenizer), np.ones(2), 0))
    asked = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    found = TASK.predict(model, tokenizer, asked, 64)
    assert [one["reward"] for one in found] == pytest.approx(wanted["chosen"], abs=1e-4)
    assert [one["completion"] for one in found] == [row["chosen"] for row in ROWS]


def test_conversations_and_texts_without_a_prompt_are_rows(models: tiny.Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.qwen2)
    asked = {"role": "user", "content": "the film was"}
    turns = {
        side: [asked, {"role": "assistant", "content": answer}]
        for side, answer in (("chosen", "great"), ("rejected", "dull"))
    }
    rows: list[Any] = TASK.encode(
        [{"prompt": None, **turns}, {"chosen": "so good", "rejected": "dull it was"}],
        tokenizer, 64, (),
    )  # fmt: skip
    rendered = tokenizer.apply_chat_template(turns["chosen"], tokenize=False)
    assert tokenizer.decode(rows[0]["chosen_ids"]).strip() == rendered.strip()
    assert tokenizer.decode(rows[1]["rejected_ids"], skip_special_tokens=True) == "dull it was"


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"margin": -1}, "margin"),
        ({"margin": "much"}, "margin"),
        ({"chosen": None}, "chosen"),
        ({"prompt": "good " * 40}, "chosen"),
    ],
)
def test_a_row_that_cannot_be_used_names_its_column(
    tokenizer: Any, change: dict[str, Any], column: str
) -> None:
    (bad,) = TASK.encode([ROWS[0] | change], tokenizer, 16, ())
    assert isinstance(bad, BadRow)
    assert repr(column) in bad.why


def test_a_prediction_needs_an_answer() -> None:
    assert TASK.prediction_problem({"prompt": None, "completion": "so"}) is None
    assert TASK.prediction_problem({"prompt": "so", "completion": " "})
    assert TASK.prediction_problem({"prompt": 3, "completion": "so"})
