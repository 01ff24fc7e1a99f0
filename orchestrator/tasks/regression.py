"""Text regression: one number per text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.tasks.base import BadRow, FeatureKind, SoftTargets
from orchestrator.tasks.labels import shown
from orchestrator.tasks.sequence import SequenceTask

if TYPE_CHECKING:
    import numpy as np
    import torch


class TextRegression(SequenceTask):
    """One number per text, learned by its squared error.

    The head starts near 0: bring targets to a spread of about 1 for a quick start.
    """

    type: Literal["text_regression"]
    value_column: str = "value"
    """Column with the number."""

    metric_names: ClassVar[tuple[str, ...]] = ("mse", "mae", "pearson", "spearman", "r2", "loss")
    default_metric: ClassVar[str] = "mse"
    target_kind: ClassVar[FeatureKind] = "float"
    soft_targets: ClassVar[SoftTargets | None] = "number"

    @property
    def target_column(self) -> str:
        return self.value_column

    def target(self, value: Any, index: Mapping[str, int]) -> Any:
        try:
            number = math.nan if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            return BadRow(
                f"column {self.value_column!r} must be a finite number, got {shown(value)}"
            )
        return number

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        names = {"id2label": {0: self.value_column}, "label2id": {self.value_column: 0}}
        return {"num_labels": 1, **names, "problem_type": "regression"}

    def target_tensor(self, targets: Sequence[Any]) -> torch.Tensor:
        import torch

        return torch.tensor([float(target) for target in targets], dtype=torch.float32)

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits.squeeze(-1) - targets) ** 2

    def outcome(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        return {"predicted": logits.squeeze(-1).cpu().numpy(), "value": targets.cpu().numpy()}

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """In fp64. Correlations of fewer than two rows, or of equal values, are 0; so is their r2."""
        import torch
        from torchmetrics.functional import regression as tm

        predicted = torch.from_numpy(gathered["predicted"]).double()
        value = torch.from_numpy(gathered["value"]).double()
        mse = float(tm.mean_squared_error(predicted, value))
        out = {"loss": mse, "mse": mse, "mae": float(tm.mean_absolute_error(predicted, value))}
        varied = len(value) > 1 and float(value.std()) > 0
        related = varied and float(predicted.std()) > 0
        return {
            **out,
            "pearson": float(tm.pearson_corrcoef(predicted, value)) if related else 0.0,
            "spearman": float(tm.spearman_corrcoef(predicted, value)) if related else 0.0,
            "r2": float(tm.r2_score(predicted, value)) if varied else 0.0,
        }

    def prediction(self, outputs: torch.Tensor, names: Mapping[int, str]) -> dict[str, Any]:
        return {"value": round(float(outputs[0]), 6)}
