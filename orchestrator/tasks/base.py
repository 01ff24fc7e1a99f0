"""The members every task has. Nothing here imports torch: method bodies do, in the workers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.errors import DataError, Problem
from orchestrator.metric import Metric
from orchestrator.tasks.default_lr import BY_SIZE, TEXT_NEW, TEXT_TUNED, Rate
from orchestrator.values import Frozen

if TYPE_CHECKING:  # annotations only: no import at run time, so no cycle and nothing heavy
    from typing import Self

    import numpy as np
    import torch

RawRow = dict[str, Any]
EncodedRow = dict[str, Any]
"""Feature name → value, and `n_targets`, which counts what is predicted."""
FeatureKind = Literal["int", "ints", "float", "floats", "bytes", "text"]
"""What a feature holds per row: a number, a list of them (`bytes`: of 0 to 255), or a text."""
SoftTargets = Literal["classes", "labels", "tokens", "number"]

IGNORED = -100
"""`transformers`' label value for positions without loss."""


@dataclass(frozen=True)
class BadRow:
    """Why one input row cannot be used."""

    why: str


@dataclass(frozen=True)
class Scores:
    """Predictions and targets of a model, target by target.

    `logits` (targets, classes) in fp32, `labels` (targets,) with -100 where nothing is learned,
    `weights` (targets,) 0 where nothing counts. Targets follow the order of the batch's rows.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class Task(Frozen):
    """Base of all tasks: input columns → features → batch → loss → metrics → predictions."""

    type: str
    metric_names: ClassVar[tuple[str, ...]]
    """Metrics an evaluation reports."""
    default_metric: ClassVar[str]
    """The metric that names the best model unless the job says otherwise."""
    auto_class: ClassVar[str]
    """The `transformers` auto class that builds the model."""
    pipeline_tag: ClassVar[str]
    """The hub's name for what the exported model does."""
    peft_task: ClassVar[str]
    """peft's `TaskType`; empty where it has none, so that adapters are told which modules are the head."""
    labeled_head: ClassVar[bool] = False
    """The model's outputs have names (`id2label`); a pretrained head for other ones is drawn anew."""
    all_logits: ClassVar[bool] = False
    """The head predicts a token of the vocabulary at every position."""
    kept_features: ClassVar[tuple[str, ...]] = ()
    """Features that `metrics` needs beside what `measure` keeps."""
    needs_tokenizer: ClassVar[bool] = False
    """Evaluation calls `decode` before `metrics`."""
    own_of_model: ClassVar[tuple[str, ...]] = ()
    """Fields that may be `auto`, and are then the model's own."""
    reads_text: ClassVar[bool] = True
    """Rows go through a tokenizer; otherwise `encode` and `predict` are given None for it."""
    text_is_data: ClassVar[bool] = False
    """Names of control tokens inside a text are ordinary text, unless `data.parse_special_tokens`."""
    pools: ClassVar[bool] = False
    """The head reads one token of a row, which padding must not change."""
    writes_on: ClassVar[bool] = False
    """The exported model goes on from a prompt, so that prompts of a batch end together."""
    token_features: ClassVar[tuple[str, ...]] = ("input_ids",)
    """Features of prepared rows that hold token ids."""
    default_global_batch_size: ClassVar[int] = 32
    """Rows per step unless the job says otherwise."""
    default_global_batch_size_source: ClassVar[str] = (
        "Devlin et al., arXiv 1810.04805, tuned BERT with 16 and 32"
    )
    tuned_lrs: ClassVar[Mapping[str, Rate]] = TEXT_TUNED
    """Usual peak learning rate of a pretrained model, by `model_type`; "" for any other."""
    adapter_lr: ClassVar[Rate | None] = None
    """That of LoRA, where the task has one of its own."""
    new_lrs: ClassVar[BY_SIZE] = TEXT_NEW
    """That of new weights, by the model's size."""
    sources: ClassVar[Mapping[str, str]] = {}
    """Field of the task → where its default comes from."""
    has_baseline: ClassVar[bool] = False
    """The frozen-feature baseline can be fitted to its rows."""
    required_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments that the model's forward must take, beyond what every model takes."""
    reads_left_to_right: ClassVar[bool] = False
    """Each token is predicted from those before it: a model that also looks ahead is refused."""
    has_scores: ClassVar[bool] = False
    """The loss is the cross entropy of `scores`, so that it can be smoothed, weighted and mixed."""
    one_label: ClassVar[bool] = False
    """A row has one label, so that two rows and their labels can be mixed."""
    label_feature: ClassVar[str] = ""
    """The feature that holds a row's labels as their numbers; empty where there are none to weight."""
    soft_targets: ClassVar[SoftTargets | None] = None
    """What a model says of a target through `scores`: one of some classes, yes or no per label, the next
    token, or a number. A teacher's can be learned from, and two passes pulled together."""
    no_soft_targets: ClassVar[str] = ""
    """Where `soft_targets` is None: why the model says no such thing."""
    fixed_length: ClassVar[bool] = False
    """Rows are packed to (nearly) one length, so grouping them by length gains nothing."""

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        """Problems across this task's own fields."""
        return iter(())

    def metric(self, name: str) -> Metric:
        """Return the metric of this name with its direction."""
        return Metric.named(name)

    @property
    def has_reference(self) -> bool:
        """Return whether loss and metrics need the untouched model's `reference` for each row."""
        return False

    def default_tuned_lr(self, model_type: str) -> Rate:
        """Return the default learning rate of full tuning for a pretrained model of this type."""
        return self.tuned_lrs.get(model_type, self.tuned_lrs[""])

    @property
    def sections(self) -> Mapping[str, Any]:
        """Return the fields that hold settings of a kind (`type` and `sources`), by name."""
        return {}

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Input columns that must exist."""

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Input columns that are read where a file has them."""
        return ()

    @property
    @abstractmethod
    def predict_columns(self) -> tuple[str, ...]:
        """The columns a prediction needs."""

    @property
    def label_source(self) -> str | None:
        """The column whose distinct labels make the label set, where the job does not give one."""
        return None

    def labels_in(self, value: Any) -> Iterable[str] | BadRow:
        """Return the labels that a value of `label_source` names, or why it names none."""
        return ()

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        """Set a tokenizer up for the task's text, in place; `config`: the model's.

        Raises OrchestratorError for one that the task cannot use.
        """

    @abstractmethod
    def features(self) -> dict[str, FeatureKind]:
        """Feature columns of prepared rows."""

    @abstractmethod
    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        """Raw rows → features, aligned with `rows`; rows that cannot be used become a BadRow.

        `truncated` is 1 in rows that lost tokens to `max_length`; `notes`, where present, holds remarks
        on a row, which are counted in the manifest.
        """

    def length(self, row: EncodedRow) -> int:
        """Tokens of an encoded row: what batches are grouped by, and what throughput counts."""
        return len(row["input_ids"])

    def padded_length(self, row: EncodedRow) -> int:
        """Tokens that the model (its encoder, where there is one) reads for a row in a batch of its
        own: what memory is planned by."""
        return self.length(row) - self.target_length(row)

    def target_length(self, row: EncodedRow) -> int:
        """Those of its tokens that a decoder reads, beside the encoder's."""
        return 0

    def targets(self, row: Mapping[str, Any]) -> int:
        """Targets of a prepared row: the weight of a loss that is a mean over a micro-batch."""
        return 1

    def pack(
        self, rows: Sequence[EncodedRow], max_length: int
    ) -> tuple[list[EncodedRow], list[EncodedRow]]:
        """(rows ready to be written, rows kept back for the next call); by default all as they are."""
        return list(rows), []

    def for_evaluation(self) -> Task:
        """Return the task as rows for evaluation are prepared by it."""
        return self

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Fields of the model's config that the task decides."""
        return {}

    @abstractmethod
    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        """Rows of one micro-batch → padded tensors of shape (rows, longest row).

        `weights` (rows,) is 0 for rows that only fill the batch; they must not count anywhere.
        """

    @abstractmethod
    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scalar: the loss summed over the batch's targets (the caller divides by their number)."""

    def reference(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """Return (only if `has_reference`) what the untouched model says of a batch, named numbers (rows,). Rows
        that are collated later have them under these names."""
        raise NotImplementedError(f"{self.type} has no reference")

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        """Return (only if `soft_targets`) the predictions that `loss_sum` is made of, its cross entropy
        where `has_scores`."""
        raise NotImplementedError(f"{self.type} has no scores")

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (only if `soft_targets`) the loss of each target (targets,), of fp32 scores."""
        import torch.nn.functional as functional

        return functional.cross_entropy(logits, targets, reduction="none")

    def regularized_losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
        class_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `losses`, smoothed and weighted by class (`class_weights`: (classes,)) where there are classes."""
        import torch.nn.functional as functional

        if not self.has_scores:
            return self.losses(logits, targets)
        losses = functional.cross_entropy(
            logits, targets, reduction="none", label_smoothing=smoothing
        )
        if class_weights is not None:
            losses = losses * class_weights[targets.clamp(min=0)]  # those of IGNORED have no loss
        return losses

    @abstractmethod
    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """Return the arrays that evaluation keeps of a batch: named, one row (of any length) per row of the batch."""

    def decode(self, gathered: dict[str, np.ndarray], tokenizer: Any) -> dict[str, np.ndarray]:
        """Turn (only if `needs_tokenizer`) token ids that `measure` kept → what `metrics` compares."""
        return gathered

    @abstractmethod
    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Metrics over the whole evaluation set, every row once."""

    @property
    def open_fields(self) -> tuple[str, ...]:
        """Fields that are `auto`: the model's own preprocessor decides them."""
        names = type(self).model_fields
        return tuple(
            name for name in self.own_of_model if name in names and getattr(self, name) == "auto"
        )

    def filled(self, source: str | None, revision: str | None, config: Mapping[str, Any]) -> Self:
        """Return the task with its open fields filled from a model.

        Args:
            source: folder or hub id; None for new weights.
            revision: branch, tag or commit on the hub.
            config: the model's own config.
        """
        return self

    def with_fields(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other values that still counts them as not set by the job."""
        copy = self.model_copy(update=dict(values))
        object.__setattr__(copy, "__pydantic_fields_set__", set(self.model_fields_set))
        return copy

    @property
    def default_sources(self) -> Mapping[str, str]:
        """Field → where the value comes from that it has without the job's."""
        return self.sources

    def head_is_new(self, config: Mapping[str, Any]) -> bool:
        """Return whether the head of a checkpoint with this config stands for other outputs than the job's."""
        return False

    def sample_inputs(self, device: str) -> dict[str, torch.Tensor]:
        """Return the model's inputs of one row where all rows have one size, else none."""
        return {}

    def forward_problem(self, model: Any) -> str | None:
        """Return why the model (on the meta device) cannot read the task's batches, or None."""
        return None

    def input_problem(self, config: Any) -> str | None:
        """Why a model of this config cannot take the task's rows, or None."""
        return None

    def exported_files(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """JSON files by name that an exported model needs beside its own."""
        return {}

    def row_of(self, given: str | RawRow) -> RawRow:
        """Return the row of an input to predict for.

        A text is the one column that the task predicts from, or a JSON object where it takes several.
        Raises DataError where a column is missing.
        """
        wanted = self.predict_columns
        if isinstance(given, str) and len(wanted) == 1:
            return {wanted[0]: given}
        try:
            row = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(column not in row for column in wanted):
            needs = ", ".join(map(repr, wanted))
            raise DataError(f"{given!r}: {self.type} predicts from an object with {needs}")
        return row

    def prediction_problem(self, row: RawRow) -> str | None:
        """Return why nothing can be predicted from a row that has the columns, or None."""
        if not self.text_is_data:
            return None
        whys = (text_problem(row[column], column) for column in self.predict_columns)
        return next((why for why in whys if why), None)

    @abstractmethod
    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        """One JSON-ready prediction per row; a row holds `predict_columns`."""


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


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Scores of (rows, tokens, classes) and (rows, tokens), token by token; those of IGNORED count nothing."""
    flat = labels.flatten()
    return Scores(logits.flatten(0, 1), flat, (flat != IGNORED).float())
