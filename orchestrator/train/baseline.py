"""The figure to beat: a logistic regression on the untouched model's features."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.stream import unpack_rows
from orchestrator.model.config import load_config
from orchestrator.model.embeddings import resize_embeddings
from orchestrator.plan.data import DataStats
from orchestrator.plan.plan import Plan
from orchestrator.tasks.batches import pad
from orchestrator.tasks.sequence import token_types
from orchestrator.train.sample import rows_by_length

BATCH_ROWS = 64


def frozen_feature_baseline(plan: Plan) -> dict[str, Any]:
    """Fit on mean-pooled last hidden states of training rows, measure on all evaluation rows.

    Returns name, train_rows, metrics (the task's) and seconds.
    """
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    assert plan.eval_data is not None
    model = _encoder(plan)
    wanted = plan.spec.evaluation.baseline_rows
    train_x, train_y = _features(plan, plan.train_data, model, None if wanted == "all" else wanted)
    eval_x, eval_y = _features(plan, plan.eval_data, model, None)
    classifier = LogisticRegression(max_iter=2000).fit(train_x, train_y)
    scores = classifier.predict_proba(eval_x)
    gathered = {
        "predicted": classifier.classes_[scores.argmax(-1)],
        "label": eval_y,
        "loss": _log_loss(scores, classifier.classes_, eval_y),
    }
    metrics = plan.spec.task.metrics(gathered, plan.labels)
    return {
        "name": f"frozen {Path(plan.spec.model.pretrained or 'model').name} + logistic regression",
        "train_rows": len(train_y),
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, float)},
        "seconds": round(time.perf_counter() - started, 2),
    }


def _log_loss(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross entropy per row, shape (rows,)."""
    of_label = scores[np.arange(len(labels)), np.searchsorted(classes, labels)]
    return -np.log(np.maximum(of_label, 1e-12))


def _encoder(plan: Plan) -> Any:
    """The untouched model without a head; of an encoder-decoder the part that reads."""
    import transformers

    model = transformers.AutoModel.from_pretrained(
        plan.spec.model.pretrained or "",
        revision=plan.spec.model.revision,
        config=load_config(plan.spec, plan.labels),
        trust_remote_code=False,
    )
    resize_embeddings(model, plan.spec)
    return (model.get_encoder() if model.config.is_encoder_decoder else model).eval()


def _features(
    plan: Plan, data: DataStats, model: Any, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean-pooled features (rows, hidden) and labels (rows,), of `limit` rows drawn by the job's seed."""
    reader, ids = rows_by_length(data, limit, plan.spec.seed)
    features, labels = [], []
    with torch.no_grad():
        for start in range(0, len(ids), BATCH_ROWS):
            rows = unpack_rows(reader.take(ids[start : start + BATCH_ROWS]))
            tokens = [row["input_ids"] for row in rows]
            mask = pad([np.ones(len(t), dtype=np.int64) for t in tokens], 0)
            hidden = model(
                input_ids=pad(tokens, plan.pad_token_id), attention_mask=mask, **token_types(rows)
            ).last_hidden_state
            weights = mask.unsqueeze(-1).float()
            features.append(((hidden * weights).sum(1) / weights.sum(1)).numpy())
            labels += [int(row["label"]) for row in rows]
    return np.concatenate(features), np.array(labels)
