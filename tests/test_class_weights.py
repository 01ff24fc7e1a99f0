"""Class weights: balanced by what the prepared data holds, and in the loss as the formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as functional
from test_plan import LAPTOP

from orchestrator.data.prepare import prepare
from orchestrator.model.build import build_model
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan import make_plan
from orchestrator.tasks.base import IGNORED, token_scores
from orchestrator.train.objective import Objective

pytestmark = pytest.mark.usefixtures("ray")

ONE = {"type": "text_classification"}
SEVERAL = {"type": "multi_label_classification"}
TAGS = {"type": "token_classification"}
TEXTS = ("great film", "dull plot", "great plot", "dull film dull")
ROWS: dict[str, list[dict[str, Any]]] = {
    "text_classification": [
        {"text": text, "label": label} for text, label in zip(TEXTS, "bbab", strict=True)
    ],
    "multi_label_classification": [
        {"text": text, "labels": labels}
        for text, labels in zip(TEXTS, (["b"], ["a", "b"], ["b"], []), strict=True)
    ],
    "token_classification": [
        {"tokens": text.split(), "tags": ["B-a"] + ["O"] * text.count(" ")} for text in TEXTS
    ],
}


@pytest.mark.parametrize(
    ("task", "weights"),
    [
        (ONE, (4 / (2 * 1), 4 / (2 * 3))),
        (SEVERAL, (3 / 1, 1 / 3)),
        (TAGS, (9 / (2 * 4), 9 / (2 * 5))),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_balanced_weights_are_counted_in_the_data_and_weight_the_loss(
    models: tiny.Tiny, tmp_path: Path, task: dict[str, Any], weights: tuple[float, ...]
) -> None:
    rows = ROWS[task["type"]]
    train = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"class_weights": "balanced"}
    spec = tiny.job(models.bert, train, tmp_path, task=task, regularization=settings)
    data = prepare(spec)
    plan = make_plan(spec, LAPTOP, data)
    assert plan.class_weights == pytest.approx(weights)
    assert "balanced" in plan.reasons["class_weights"]

    labels = data["train"].manifest.labels
    model: Any = build_model(spec, labels).eval()
    encoded = spec.task.encode(rows, load_tokenizer(spec), 32, labels)
    arrays = [{k: np.array(v) for k, v in row.items()} for row in encoded]  # type: ignore[union-attr]
    counts = np.ones(len(rows), dtype=np.float32)
    total, own = Objective(plan, model)(model, arrays, counts)
    batch = spec.task.collate(arrays, counts, plan.pad_token_id)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = _weighted(logits, batch["labels"], torch.tensor(weights))
    plain = _weighted(logits, batch["labels"], torch.ones(len(weights)))
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(own) == pytest.approx(float(plain), rel=1e-5)
    assert float(total) != pytest.approx(float(own), rel=1e-4)


def _weighted(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss summed over targets, written out."""
    if labels.shape == logits.shape:  # several yes and no: the mean over labels, yes weighted
        truth = labels.float()
        yes, no = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        return -(weights * truth * yes + (1 - truth) * no).mean(-1).sum()
    if logits.dim() == 3:
        scores = token_scores(logits, labels)
        logits, labels = scores.logits, scores.labels
    kept = labels != IGNORED
    log_p = functional.log_softmax(logits[kept], dim=-1)
    chosen = labels[kept]
    return -(weights[chosen] * log_p[torch.arange(len(chosen)), chosen]).sum()
