"""Single-label text classification."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.tasks.base import SoftTargets
from orchestrator.tasks.sequence import SequenceTask
from orchestrator.tasks.single_label import SingleLabel


class TextClassification(SingleLabel, SequenceTask):
    """One label per text, through a sequence-classification head."""

    type: Literal["text_classification"]

    has_baseline: ClassVar[bool] = True
    soft_targets: ClassVar[SoftTargets | None] = "classes"
