"""Base of tasks that give each row one label of a set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.errors import Problem
from orchestrator.tasks.base import BadRow, FeatureKind, Task
from orchestrator.tasks.labels import (
    is_missing,
    label_name,
    label_number,
    label_problems,
    per_label,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


class SingleLabel(Task):
    """One label per row: its names, cross-entropy, and how often it is right."""

    label_column: str = "label"
    """Column with the label: text, integer or boolean."""
    labels: tuple[str, ...] | None = None
    """The label set, in the order of the model's outputs; integers in the rows count from 0 through it, unless
    they are labels themselves. Default: the names in a Parquet file's `datasets` metadata, else the distinct
    values of the training rows, sorted."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "f1_micro",
        "precision_micro",
        "recall_micro",
        "loss",
    )
    default_metric: ClassVar[str] = "accuracy"
    labeled_head: ClassVar[bool] = True
    target_kind: ClassVar[FeatureKind] = "int"
    has_scores: ClassVar[bool] = True
    one_label: ClassVar[bool] = True
    label_feature: ClassVar[str] = "label"

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from label_problems(self.labels)

    @property
    def target_column(self) -> str:
        """The column with what is to be predicted."""
        return self.label_column

    @property
    def label_source(self) -> str | None:
        return self.label_column if self.labels is None else None

    def labels_in(self, value: Any) -> Iterable[str] | BadRow:
        name = self._missing(value) or label_name(value)
        return BadRow(self._about(name)) if isinstance(name, BadRow) else (name,)

    def target(self, value: Any, index: Mapping[str, int]) -> Any:
        missing = self._missing(value) if str(value) not in index else None
        number = missing or label_number(value, index, given=self.labels is not None)
        return BadRow(self._about(number)) if isinstance(number, BadRow) else number

    def _missing(self, value: Any) -> BadRow | None:
        return BadRow("is missing, null or empty") if is_missing(value) else None

    def _about(self, bad: BadRow) -> str:
        """Return a reason that names the column."""
        if bad.why.startswith(("is ", "must ")):
            return f"column {self.label_column!r} {bad.why}"
        return bad.why

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def target_tensor(self, targets: Sequence[Any]) -> torch.Tensor:
        import torch

        return torch.tensor([int(target) for target in targets])

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as functional

        return functional.cross_entropy(logits, targets, reduction="none")

    def outcome(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        return {"predicted": logits.argmax(-1).cpu().numpy(), "label": targets.cpu().numpy()}

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        import torch
        from torchmetrics.functional import classification as tm

        predicted = torch.from_numpy(gathered["predicted"])
        target = torch.from_numpy(gathered["label"])
        n = len(labels)
        precision, recall, f1 = (
            score(predicted, target, num_classes=n, average="none")
            for score in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
        )
        accuracy = float((predicted == target).double().mean())
        confusion = tm.multiclass_confusion_matrix(predicted, target, num_classes=n)
        return {
            "loss": float(gathered["loss"].astype("float64").mean()),
            "accuracy": accuracy,
            "f1_macro": float(f1.mean()),
            "precision_macro": float(precision.mean()),
            "recall_macro": float(recall.mean()),
            **dict.fromkeys(
                ("f1_micro", "precision_micro", "recall_micro"), accuracy
            ),  # one label per row
            **per_label(labels, precision, recall, f1),
            "confusion": confusion.tolist(),
        }

    def prediction(self, outputs: torch.Tensor, names: Mapping[int, str]) -> dict[str, Any]:
        scores = outputs.softmax(-1)
        return {"label": names[int(scores.argmax())], "score": round(float(scores.max()), 6)}
