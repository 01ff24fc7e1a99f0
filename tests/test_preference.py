"""Preference tuning: pairs of answers, rewards, the losses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data.prepare import prepared_folder
from orchestrator.data.sources import find_files
from orchestrator.renames import with_new_names
from orchestrator.tasks import BadRow, PreferenceTuning
from orchestrator.tasks.preference_losses import DPO

TASK = PreferenceTuning(type="preference", loss=DPO(beta=0.5))
Answers = list[tuple[float, int, float]]
"""Per pair: log-likelihood, tokens, the reference's log-likelihood."""
ROWS = [
    {"prompt": "the film was", "chosen": " great again", "rejected": " dull"},
    {"prompt": "so", "chosen": " good", "rejected": " not good at all today"},
]


def with_loss(**loss: Any) -> PreferenceTuning:
    return PreferenceTuning.model_validate({"type": "preference", "loss": loss})


@pytest.fixture(scope="module")
def tokenizer(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.llama)


@pytest.fixture(scope="module")
def model(models: tiny.Tiny) -> Any:
    model = AutoModelForCausalLM.from_pretrained(models.llama, dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def arrays(rows: list[Any], **reference: list[float]) -> list[dict[str, Any]]:
    found = [{name: np.asarray(row[name]) for name in TASK.features()} for row in rows]
    return [{**row, **{n: v[i] for n, v in reference.items()}} for i, row in enumerate(found)]


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of the answer and the end after it, token by token."""
    head = tokenizer(prompt)["input_ids"]
    ids = [*head, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(scores[i - 1, ids[i]] for i in range(len(head), len(ids))))


def test_the_reference_is_the_likelihood_of_each_whole_answer(tokenizer: Any, model: Any) -> None:
    rows = arrays(TASK.encode(ROWS, tokenizer, 64, ()))
    with torch.no_grad():
        found = TASK.reference(model, TASK.collate(rows, np.ones(2), 0))
    for side in ("chosen", "rejected"):
        wanted = [log_likelihood(model, tokenizer, r["prompt"], r[side]) for r in ROWS]
        assert found[f"reference_{side}"] == pytest.approx(wanted, rel=1e-4)


def test_the_loss_is_that_of_the_paper(tokenizer: Any, model: Any) -> None:
    reference = {"reference_chosen": [-9.0, -20.0], "reference_rejected": [-15.0, -18.0]}
    rows = arrays(TASK.encode(ROWS, tokenizer, 64, ()), **reference)
    batch = TASK.collate(rows, np.ones(2), 0)
    rewards = {
        side: np.array(
            [
                0.5 * (log_likelihood(model, tokenizer, r["prompt"], r[side]) - given)
                for r, given in zip(ROWS, reference[f"reference_{side}"], strict=True)
            ]
        )
        for side in ("chosen", "rejected")
    }
    margin = rewards["chosen"] - rewards["rejected"]
    wanted = np.log1p(np.exp(-margin))
    with torch.no_grad():
        measured = TASK.measure(model, batch)
        assert float(TASK.loss_sum(model, batch)) == pytest.approx(wanted.sum(), rel=1e-4)
        without = TASK.collate(rows, np.array([1, 0]), 0)
        assert float(TASK.loss_sum(model, without)) == pytest.approx(wanted[0], rel=1e-4)
        smooth = with_loss(type="dpo", beta=0.5, label_smoothing=0.2)
        turned = 0.8 * wanted + 0.2 * np.log1p(np.exp(margin))
        assert float(smooth.loss_sum(model, batch)) == pytest.approx(turned.sum(), rel=1e-4)
    got = TASK.metrics(measured, ())
    assert got["reward_margin"] == pytest.approx(margin.mean(), rel=1e-4)
    assert got["reward_accuracy"] == (margin > 0).mean()
    assert got["reward_chosen"] == pytest.approx(rewards["chosen"].mean(), rel=1e-4)
    assert set(TASK.metric_names) <= set(got)


def expected_losses(kind: str, chosen: Answers, rejected: Answers) -> np.ndarray:
    """The losses as their papers define them, pair by pair, in plain Python."""
    out = []
    for (total, count, reference), (total_r, count_r, reference_r) in zip(
        chosen, rejected, strict=True
    ):
        mean, mean_r = total / count, total_r / count_r
        if kind == "ipo":
            ratio = (total - reference) / count - (total_r - reference_r) / count_r
            out.append((ratio - 1 / (2 * 0.3)) ** 2)
        elif kind == "simpo":
            out.append(math.log1p(math.exp(-(0.3 * mean - 0.3 * mean_r - 0.7))))
        else:
            odds, odds_r = (math.exp(m) / (1 - math.exp(m)) for m in (mean, mean_r))
            out.append(-mean - 0.3 * math.log(1 / (1 + odds_r / odds)))
    return np.array(out)


@pytest.mark.parametrize(
    "loss",
    [
        {"type": "ipo", "beta": 0.3},
        {"type": "simpo", "beta": 0.3, "gamma": 0.7},
        {"type": "orpo", "beta": 0.3},
    ],
    ids=lambda loss: loss["type"],
)
def test_each_loss_is_that_of_its_paper(loss: dict[str, Any], tokenizer: Any, model: Any) -> None:
    task = with_loss(**loss)
    given = {"chosen": [-9.0, -20.0], "rejected": [-15.0, -18.0]}
    answers = {
        side: [
            (
                log_likelihood(model, tokenizer, row["prompt"], row[side]),
                len(tokenizer(row[side])["input_ids"]) + 1,
                reference,
            )
            for row, reference in zip(ROWS, given[side], strict=True)
        ]
        for side in ("chosen", "rejected")
    }
    reference = {f"reference_{side}": values for side, values in given.items()}
    rows = arrays(task.encode(ROWS, tokenizer, 64, ()), **(reference if task.has_reference else {}))
    wanted = expected_losses(loss["type"], **answers)
    with torch.no_grad():
        measured = task.measure(model, task.collate(rows, np.ones(2), 0))
        second = float(task.loss_sum(model, task.collate(rows, np.array([0, 1]), 0)))
    assert measured["loss"] == pytest.approx(wanted, rel=1e-4)
    assert second == pytest.approx(wanted[1], rel=1e-4)
    assert task.has_reference == (loss["type"] == "ipo")


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_a_step_down_each_loss_widens_the_margin(kind: str, tokenizer: Any, model: Any) -> None:
    task, trained = with_loss(type=kind), copy.deepcopy(model)
    rows = arrays(task.encode(ROWS[:1], tokenizer, 64, ()))
    batch = task.collate(rows, np.ones(1), 0)
    if task.has_reference:
        with torch.no_grad():
            found = task.reference(model, batch)
        rows = [{**rows[0], **{name: values[0] for name, values in found.items()}}]
        batch = task.collate(rows, np.ones(1), 0)

    def margin() -> float:
        with torch.no_grad():
            return task.metrics(task.measure(trained, batch), ())["reward_margin"]

    before = margin()
    task.loss_sum(trained, batch).backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert margin() > before


def test_a_loss_left_open_is_dpo_and_an_unknown_one_is_refused() -> None:
    assert PreferenceTuning(type="preference").loss == DPO() == with_loss().loss
    with pytest.raises(ValidationError) as caught:
        with_loss(type="kto")
    assert caught.value.errors()[0]["loc"][0] == "loss"


def test_settings_of_stored_plans_are_those_of_dpo() -> None:
    stored = {"task": {"type": "preference", "beta": 0.2, "label_smoothing": 0.1}}
    task = PreferenceTuning.model_validate(with_new_names(stored)[0]["task"])
    assert task.loss == DPO(beta=0.2, label_smoothing=0.1)


def test_a_pair_takes_the_room_of_its_longer_answer_twice(tokenizer: Any) -> None:
    rows = TASK.encode(ROWS, tokenizer, 64, ())
    for row, found in zip(rows, arrays(rows), strict=True):
        ids = TASK.collate([found], np.ones(1), 0)["input_ids"]
        assert TASK.padded_length(row) == ids.numel()
        assert TASK.length(row) < ids.numel()


def test_an_untrained_model_has_no_margin_and_is_not_called_right() -> None:
    zero = np.zeros(3)
    got = TASK.metrics({"loss": zero, "chosen": zero, "rejected": zero}, ())
    assert (got["reward_accuracy"], got["reward_margin"]) == (0, 0)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": None}, "no prompt can be told"),
        ({"rejected": ""}, "'rejected' is empty"),
        ({"chosen": " dull"}, "both answers are the same"),
        ({"prompt": "good " * 40}, "nothing of column 'chosen' is within 16 tokens"),
    ],
)
def test_a_pair_that_teaches_nothing_is_bad(tokenizer: Any, row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([ROWS[0] | row], tokenizer, 16, ())
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_what_is_decided_after_preparing_finds_the_same_rows(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def folder(**task: Any) -> Path:
        spec = tiny.job(models.llama, rows, tmp_path, task={"type": "preference", **task})
        files = find_files(spec.data.train, spec.data.format)
        return prepared_folder(spec, "train", files, None, False)

    assert (
        folder()
        == folder(loss={"beta": 0.5, "label_smoothing": 0.1})
        == folder(loss={"type": "orpo"})
    )
    assert folder(chosen_column="rejected", rejected_column="chosen") != folder()
