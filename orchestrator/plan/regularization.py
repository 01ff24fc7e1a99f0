"""Facts of data, tokenizer and model that regularization needs before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.manifest import read_manifest
from orchestrator.data.shards import open_shards
from orchestrator.errors import PlanError
from orchestrator.model.config import dropouts, load_config
from orchestrator.spec import JobSpec


def class_weights(
    spec: JobSpec, labels: Sequence[str], folder: Path, reasons: dict[str, str]
) -> tuple[float, ...]:
    """Weight of each label, in the order of `labels`; empty where all count alike.

    Raises PlanError for a label that the data does not have.
    """
    wanted = spec.regularization.class_weights
    if wanted is None:
        return ()
    if isinstance(wanted, dict):
        unknown = sorted(wanted.keys() - set(labels))
        if unknown:
            raise PlanError(
                f"regularization.class_weights: {unknown[0]!r} is no label of this data. "
                f"Labels: {', '.join(labels)}."
            )
        return tuple(wanted.get(label, 1.0) for label in labels)
    values = _labels_of_rows(folder, spec.task.label_feature)
    if spec.task.soft_targets == "labels":
        held = values.reshape(-1, len(labels))
        reasons["class_weights"] = "balanced: rows without the label / rows with it, where it holds"
        yes = held.sum(axis=0).tolist()
        return tuple((len(held) - count) / count if 0 < count < len(held) else 1.0 for count in yes)
    counts = np.bincount(values, minlength=len(labels)).tolist()
    reasons["class_weights"] = "balanced: all / (labels × those of the label), mean 1 over all"
    return tuple(len(values) / (len(labels) * count) if count else 1.0 for count in counts)


def _labels_of_rows(folder: Path, feature: str) -> np.ndarray:
    """The numbers that `feature` holds, of all rows."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise PlanError(f"{folder}: prepared data is gone. Run `orchestrator prepare` again.")
    return open_shards(str(folder), manifest).column(feature)


def check_dropout(spec: JobSpec, labels: tuple[str, ...]) -> None:
    """Raises PlanError where R-Drop would compare a model with itself: no dropout, no noise."""
    settings = spec.regularization
    if settings.r_drop_alpha is None or settings.neftune_alpha is not None:
        return
    of_model = dropouts(load_config(spec, labels)).values()
    if not any(of_model) and not getattr(spec.tuning, "lora_dropout", 0):
        raise PlanError(
            "regularization.r_drop_alpha: every dropout of the model's config is 0, so both passes are "
            "the same. Set model.dropout=0.1."
        )


def mask_token(spec: JobSpec, tokenizer: Any, reasons: dict[str, str]) -> int | None:
    """The token that stands for masked ones; None where none are masked.

    Raises PlanError where the tokenizer has neither a mask token nor an unknown one.
    """
    if not spec.regularization.token_dropout:
        return None
    if tokenizer.mask_token_id is not None:
        reasons["mask_token_id"] = f"the tokenizer's mask token {tokenizer.mask_token!r}"
        return int(tokenizer.mask_token_id)
    if tokenizer.unk_token_id is None:
        raise PlanError(
            "regularization.token_dropout: the tokenizer has neither a mask token nor an unknown token to "
            "put in place of others. Drop it, or use regularization.neftune_alpha."
        )
    reasons["mask_token_id"] = f"no mask token: the unknown token {tokenizer.unk_token!r}"
    return int(tokenizer.unk_token_id)


def special_tokens(spec: JobSpec, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that masking leaves alone."""
    if not spec.regularization.token_dropout:
        return ()
    return tuple(sorted(set(tokenizer.all_special_ids)))


def passes_per_row(spec: JobSpec) -> int:
    """Return how often a row stands in its micro-batch."""
    return 1 if spec.regularization.r_drop_alpha is None else 2
