"""Multi-label text classification: any number of labels per text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.errors import Problem
from orchestrator.tasks.base import BadRow, FeatureKind, SoftTargets
from orchestrator.tasks.labels import (
    is_missing,
    label_name,
    label_number,
    label_problems,
    list_in,
    per_label,
    shown,
)
from orchestrator.tasks.sequence import SequenceTask

if TYPE_CHECKING:
    import numpy as np
    import torch


def _confusion(
    predicted: torch.Tensor, target: torch.Tensor, labels: Sequence[str]
) -> dict[str, list[list[int]]]:
    """Rows by label: [[predicted, not predicted] where it holds, the same where it does not]."""
    from torchmetrics.functional.classification import multilabel_confusion_matrix

    found = multilabel_confusion_matrix(predicted, target, num_labels=len(labels))
    return {label: of.flip(0, 1).tolist() for label, of in zip(labels, found, strict=True)}


def _is_multi_hot(items: Sequence[Any], index: Mapping[str, int]) -> bool:
    """Return whether a list holds a 0 or 1 per label, and is no list of different labels."""
    if len(items) != len(index) or {"0", "1"} & index.keys():
        return False
    return _are_zeros_and_ones(items) and len(set(items)) < len(items)


def _are_zeros_and_ones(items: Sequence[Any]) -> bool:
    return all(isinstance(item, int | float) and item in (0, 1) for item in items)


class MultiLabelClassification(SequenceTask):
    """None, one or several labels per text: one yes or no per label."""

    type: Literal["multi_label_classification"]
    labels_column: str = "labels"
    """Column with the labels: a list, a list written as text, or a text with `separator` between them. Empty:
    no label holds. With `labels` given, integers count from 0 through them, and a list of 0 and 1 as long as
    they are, with one of the two twice, says of each whether it holds."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """Cuts labels that come as one text, as in CSV files."""
    labels: tuple[str, ...] | None = None
    """The label set, in the order of the model's outputs. Default: all labels of the training rows, sorted."""
    threshold: Annotated[float, Field(gt=0, lt=1), Affects(Effect.PREDICTION)] = 0.5
    """A label holds where its probability is above this: in metrics and predictions."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "f1_micro",
        "f1_macro",
        "precision_micro",
        "precision_macro",
        "recall_micro",
        "recall_macro",
        "exact_match",
        "loss",
    )
    default_metric: ClassVar[str] = "f1_micro"
    target_kind: ClassVar[FeatureKind] = "ints"
    label_feature: ClassVar[str] = "label"
    soft_targets: ClassVar[SoftTargets | None] = "labels"
    sources: ClassVar[Mapping[str, str]] = {
        "threshold": "likelier than not; the best one for F1 lies lower (Lipton et al., arXiv 1402.1892)"
    }

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from label_problems(self.labels)

    @property
    def target_column(self) -> str:
        return self.labels_column

    @property
    def label_source(self) -> str | None:
        return self.labels_column if self.labels is None else None

    def _items(self, value: Any) -> list[Any] | BadRow:
        """Return the labels of a row as it writes them: a list, a list written as text, or separated text."""
        items = list_in(value)
        if items is None and isinstance(value, str):
            items = [part.strip() for part in value.split(self.separator)]
        if items is None:
            why = f"must be a list of labels or a text, got {shown(value)}"
            return BadRow(f"column {self.labels_column!r} {why}")
        if self.labels is None and _are_zeros_and_ones(items) and len(set(items)) < len(items):
            why = f"holds a 0 or 1 per label, {shown(items)}: list the labels' names under task.labels"
            return BadRow(f"column {self.labels_column!r} {why}")
        return [item for item in items if not is_missing(item)]

    def labels_in(self, value: Any) -> Iterable[str] | BadRow:
        items = self._items(value)
        if isinstance(items, BadRow):
            return items
        names: list[str] = []
        for name in map(label_name, items):
            if isinstance(name, BadRow):
                return BadRow(f"column {self.labels_column!r} holds a value that {name.why}")
            names.append(name)
        return names

    def target(self, value: Any, index: Mapping[str, int]) -> Any:
        items = self._items(value)
        if isinstance(items, BadRow):
            return items
        if self.labels is not None and _is_multi_hot(items, index):
            return [int(item) for item in items]
        held = set()
        for item in items:
            number = label_number(item, index, given=self.labels is not None)
            if isinstance(number, BadRow):
                holds = number.why.startswith(("is ", "must "))
                why = f"column {self.labels_column!r} holds a value that {number.why}"
                return BadRow(why if holds else number.why)
            held.add(number)
        return [int(number in held) for number in index.values()]

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "multi_label_classification",
        }

    def target_tensor(self, targets: Sequence[Any]) -> torch.Tensor:
        import numpy as np
        import torch

        return torch.from_numpy(np.stack(targets).astype(np.int64))

    def regularized_losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
        class_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the losses; yes and no of a label are smoothed as two classes."""
        smoothed = targets * (1 - smoothing) + smoothing / 2
        return self.losses(logits, smoothed, class_weights)

    def losses(
        self, logits: torch.Tensor, targets: torch.Tensor, yes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Binary cross-entropy, the mean over labels; `yes` (labels,) weights those that hold."""
        import torch.nn.functional as functional

        each = functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none", pos_weight=yes
        )
        return each.mean(-1)

    def outcome(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        held = logits.sigmoid() > self.threshold
        return {"predicted": held.long().cpu().numpy(), "label": targets.cpu().numpy()}

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        import torch
        from torchmetrics.functional import classification as tm

        predicted = torch.from_numpy(gathered["predicted"])
        target = torch.from_numpy(gathered["label"])
        scores = {
            "precision": tm.multilabel_precision,
            "recall": tm.multilabel_recall,
            "f1": tm.multilabel_f1_score,
        }
        micro, each = (
            {
                name: score(predicted, target, num_labels=len(labels), average=average)
                for name, score in scores.items()
            }
            for average in ("micro", "none")
        )
        return {
            "loss": float(gathered["loss"].astype("float64").mean()),
            "exact_match": float((predicted == target).all(-1).double().mean()),
            **{f"{name}_micro": float(score) for name, score in micro.items()},
            **{f"{name}_macro": float(score.mean()) for name, score in each.items()},
            **per_label(labels, each["precision"], each["recall"], each["f1"]),
            "confusion_per_label": _confusion(predicted, target, labels),
        }

    def prediction(self, outputs: torch.Tensor, names: Mapping[int, str]) -> dict[str, Any]:
        scores = {names[i]: round(float(p), 6) for i, p in enumerate(outputs.sigmoid())}
        return {"labels": [n for n, p in scores.items() if p > self.threshold], "scores": scores}
