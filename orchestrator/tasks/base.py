"""The members every task has. Nothing here imports torch: method bodies do, in the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.errors import Problem
from orchestrator.values import Frozen

if TYPE_CHECKING:  # annotations only: no import at run time, so no cycle and nothing heavy
    import numpy as np
    import torch

RawRow = dict[str, Any]
EncodedRow = dict[str, Any]
"""Feature name → int or list of int. `input_ids` is always there; `n_targets` counts what is predicted."""


@dataclass(frozen=True)
class BadRow:
    """Why one input row cannot be used."""

    why: str


class Task(Frozen):
    """Base of all tasks: text columns → features → batch → loss → metrics → predictions."""

    metric_names: ClassVar[tuple[str, ...]]
    """Metrics an evaluation reports."""
    default_metric: ClassVar[str]
    """The metric that names the best model unless the job says otherwise."""
    auto_class: ClassVar[str]
    """The `transformers` auto class that builds the model."""
    required_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments that the model's forward must take, beyond what every model takes."""
    fixed_length: ClassVar[bool] = False
    """Rows are packed to (nearly) one length, so grouping them by length gains nothing."""

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        """Problems across this task's own fields."""
        return iter(())

    def higher_is_better(self, metric: str) -> bool:
        """Whether `metric` is to be maximised."""
        return metric not in ("loss", "perplexity")

    @property
    def columns(self) -> tuple[str, ...]:
        """Input columns that must exist."""
        raise NotImplementedError

    @property
    def label_source(self) -> str | None:
        """The column whose distinct values make the label set, where the job does not give one."""
        return None

    def features(self) -> dict[str, Literal["int", "ints"]]:
        """Feature columns of prepared rows."""
        raise NotImplementedError

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        """Raw rows → features, aligned with `rows`; rows that cannot be used become a BadRow.

        `truncated` is 1 in rows that lost tokens to `max_length`.
        """
        raise NotImplementedError

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        """(rows ready to be written, rows kept back for the next call); by default nothing is packed."""
        return list(rows), []

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Fields of the model's config that the task decides."""
        return {}

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        """Rows of one micro-batch → padded tensors of shape (rows, longest row).

        `weights` (rows,) is 0 for rows that only fill the batch; they must not count anywhere.
        """
        raise NotImplementedError

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scalar: the loss summed over the batch's targets (the caller divides by their number)."""
        raise NotImplementedError

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """What evaluation keeps of a batch: named arrays, one row per row of the batch."""
        raise NotImplementedError

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Metrics over the whole evaluation set, every row once."""
        raise NotImplementedError

    def predict(
        self, model: Any, tokenizer: Any, texts: Sequence[str], max_length: int
    ) -> list[dict[str, Any]]:
        """One JSON-ready prediction per text."""
        raise NotImplementedError


def text_problem(value: Any, column: str) -> str | None:
    """Why `value` is no usable text, or None."""
    if value is None:
        return f"column {column!r} is missing or null"
    if not isinstance(value, str):
        return f"column {column!r} must be text, got {type(value).__name__}: {value!r}"
    if not value.strip():
        return f"column {column!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair: "\\ud83d"
        return f"column {column!r} is no text: lone surrogate at character {error.start}"
    return None


def pad(arrays: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """Stack 1-D integer arrays to (rows, longest), filled with `value` on the right."""
    import numpy as np
    import torch

    out = np.full((len(arrays), max(len(a) for a in arrays)), value, dtype=np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
