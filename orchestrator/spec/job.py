"""The job: everything a user says, as one frozen value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from orchestrator.effects import Affects, DecidedBy, Effect
from orchestrator.spec.data import DataSpec
from orchestrator.spec.distillation import DistillationSpec
from orchestrator.spec.kubernetes import KubernetesSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.optimization import BatchSpec, ZeroSpec
from orchestrator.spec.optimizers import AdamW, OptimizerSpec
from orchestrator.spec.paths import PathText
from orchestrator.spec.regularization import RegularizationSpec
from orchestrator.spec.runtime import RuntimeSpec
from orchestrator.spec.schedule import LinearSchedule, ScheduleSpec
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.tuning import FullTuning, TuningSpec
from orchestrator.tasks import TaskSpec
from orchestrator.values import Frozen

BY_STEPS = DecidedBy(("evaluation.every_steps",))
BY_METRIC = DecidedBy(("evaluation.every_steps", "evaluation.metric"))
EVERYTHING = Affects(
    Effect.ROWS, Effect.MODEL, Effect.CHECKPOINT, Effect.TRAINING
)  # what the field of a kind does not need, it says itself


class StopSpec(Frozen):
    """End of training: whichever limit comes first."""

    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; fractions allowed. Default 1 where neither limit is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    max_time_s: Annotated[float | None, Field(gt=0), Affects(Effect.LENGTH)] = None
    """Seconds of training, restarts included; of a population-based trial, its parents' too. A run that
    reaches it is measured, saved and exported; with a larger value the same command resumes it."""
    target: Annotated[float | None, BY_METRIC] = None
    """Stop once `evaluation.metric` reaches this value."""
    patience: Annotated[int | None, Field(ge=1), BY_METRIC] = None
    """Stop after so many evaluations in a row without a better `evaluation.metric`."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """For `patience`, a value counts as better when it beats the best by more than this."""
    overfitting_evals: Annotated[int | None, Field(ge=1), BY_STEPS] = None
    """Stop after so many evaluations in a row in which the evaluation loss rose while the training
    loss fell."""
    max_loss_ratio: Annotated[float | None, Field(gt=1), BY_STEPS] = None
    """Stop once the mean training loss between two evaluations is more than this many times the lowest
    before it, or the first step's: training diverges though every number is finite. Losses that are not end any run."""


class WorkerRange(Frozen):
    """A number of workers that follows the cluster: fewer when nodes leave, more when they come back.

    The global batch and the order of rows stay the same; every change starts from a checkpoint.
    """

    min: Annotated[int, Field(ge=1)]
    """Minimum number of workers; training waits for capacity below it. Each worker's part of the batch must fit."""
    max: Annotated[int, Field(ge=1)]
    """The most there ever are."""
    elastic_resize_monitor_interval_s: Annotated[float, Field(gt=0)] = 60
    """Seconds between checks for free capacity. The run commits a checkpoint before it grows."""


def _count_or_range(value: Any) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "count"


NumWorkers = Annotated[
    Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Tag("count")]
    | Annotated[WorkerRange, Tag("range")],
    Discriminator(_count_or_range),
]


class ResourcesSpec(Frozen):
    """Resources of the job on the cluster."""

    num_workers: Annotated[NumWorkers, Affects(Effect.ROUNDING)] = "auto"
    """Ray Train workers: a number, `{min: 1, max: 4}` to follow the cluster, or `auto`: one per GPU, or
    two on CPU."""
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0, le=1)] | Literal["auto"], Affects(Effect.DEVICE)
    ] = "auto"
    """`auto`: 1 where the cluster has GPUs, else 0 (CPU and gloo)."""
    cpus_per_worker: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Affects()] = "auto"
    """CPU cores per worker, also its thread count. `auto`: an equal share of the node."""
    gpu_memory_gib: Annotated[float | None, Field(gt=0), Affects()] = None
    """Memory of one GPU, where Ray's name for it does not tell: cards that are not known, or are sold with
    less than this product takes them to have (an A100 of 40 GiB). Default: by the name."""


class EvaluationSpec(Frozen):
    """Evaluation on held-out rows: interval and metric."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, at every `epoch`'s end, or only at the `end`. The end always counts."""
    metric: str | None = None
    """The metric that names the best model. Default: the task's (`accuracy`, `loss`)."""
    baseline_rows: Annotated[Annotated[int, Field(ge=2)] | Literal["all"] | None, Affects()] = None
    """Text classification: also fit a logistic regression on the untouched model's mean-pooled
    features of this many training rows, and report it beside the result."""


class CheckpointSpec(Frozen):
    """Checkpoints: interval, and the number that is kept."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps between checkpoints. `auto`: ten over the run, at least 20 steps apart."""
    num_to_keep: Annotated[int, Field(ge=1)] = 2
    """Committed checkpoints kept, newest first; the best evaluated one is kept beside them."""
    mode: Literal["async", "sync"] = "async"
    """`async` hashes and uploads while training continues; `sync` waits for the commit."""


class FaultToleranceSpec(Frozen):
    """Limits on restarts and skipped steps."""

    max_failures: Annotated[int, Field(ge=0)] = 8
    """Restarts of the worker group before the run gives up."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 3
    """Consecutive steps skipped for non-finite gradients before the run stops as diverged."""
    health_timeout_s: Annotated[float, Field(gt=0)] = 60
    """A worker that answers nothing for this long is taken for dead."""


class TrackingSpec(Frozen):
    """Trackers of figures besides the run folder and its TensorBoard files."""

    mlflow: str | None = None
    """MLflow tracking URI (`sqlite:///mlflow.db`, `http://…`). Needs the `mlflow` extra."""
    project: str | None = None
    """MLflow experiment. Default: the job's name."""


class JobSpec(Frozen):
    """One fine-tuning job."""

    name: Annotated[str, Affects(), Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    """Run name: lower-case letters, digits, `.`, `_`, `-`. Running the same name again resumes it."""
    task: Annotated[TaskSpec, EVERYTHING]
    """The task: input columns, loss, metrics and predictions."""
    model: Annotated[ModelSpec, EVERYTHING]
    """The model to fine-tune."""
    data: Annotated[DataSpec, Affects(Effect.ROWS, Effect.CHECKPOINT, Effect.TRAINING)]
    """Training and evaluation data."""
    tuning: Annotated[TuningSpec, Affects(Effect.MODEL, Effect.CHECKPOINT, Effect.TRAINING)] = (
        FullTuning()
    )
    """Full fine-tuning or an adapter, and what stays frozen."""
    optimizer: Annotated[OptimizerSpec, Affects(Effect.TRAINING)] = AdamW()
    """The optimizer and its settings."""
    schedule: Annotated[ScheduleSpec, Affects(Effect.TRAINING)] = LinearSchedule()
    """Schedule of the learning rate."""
    regularization: Annotated[RegularizationSpec, Affects(Effect.TRAINING)] = RegularizationSpec()
    """Regularization: dropout, penalties, noise, label smoothing, averaged weights."""
    distillation: Annotated[DistillationSpec | None, Affects(Effect.ROWS, Effect.TRAINING)] = None
    """A larger model to learn from, beside the labels."""
    batch: Annotated[BatchSpec, Affects(Effect.CHECKPOINT, Effect.TRAINING)] = BatchSpec()
    """Rows per step."""
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Affects(Effect.MODEL, Effect.CHECKPOINT, Effect.TRAINING),
    ] = "auto"
    """`auto`: bf16 on GPUs that have it, else fp32."""
    gradient_clipping: Annotated[float | None, Field(gt=0), Affects(Effect.TRAINING)] = 1.0
    """Largest global L2 norm of the gradient; null switches clipping off."""
    gradient_checkpointing: Annotated[bool, Affects(Effect.MODEL, Effect.TRAINING)] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    zero: Annotated[ZeroSpec, Affects(Effect.CHECKPOINT, Effect.TRAINING)] = ZeroSpec()
    """DeepSpeed ZeRO."""
    stop: Annotated[StopSpec, Affects(Effect.CHECKPOINT, Effect.TRAINING)] = StopSpec()
    """Limits on steps, epochs and time, and early stopping."""
    evaluation: Annotated[EvaluationSpec, Affects(Effect.DECISIONS)] = EvaluationSpec()
    """Evaluation: frequency, metric and baseline."""
    checkpoint: Annotated[CheckpointSpec, Affects()] = CheckpointSpec()
    """Checkpoints: frequency, number and mode."""
    resources: Annotated[ResourcesSpec, Affects(Effect.CHECKPOINT, Effect.TRAINING)] = (
        ResourcesSpec()
    )
    """Workers and their CPUs, GPUs and memory."""
    runtime: Annotated[RuntimeSpec, Affects()] = RuntimeSpec()
    """Environment of a submitted job: packages, variables, files."""
    fault_tolerance: Annotated[FaultToleranceSpec, Affects()] = FaultToleranceSpec()
    """Restarts after failures, and time limits."""
    tracking: Annotated[TrackingSpec, Affects()] = TrackingSpec()
    """Experiment trackers that receive the metrics."""
    kubernetes: Annotated[KubernetesSpec, Affects()] = KubernetesSpec()
    """Settings of the manifests that `render` writes for KubeRay."""
    sweep: Annotated[SweepSpec | None, Affects(Effect.SEARCH)] = None
    """Search over fields of this job; `orchestrator sweep` runs it, `train` leaves it alone."""
    seed: Annotated[int, Field(ge=0, lt=2**32), EVERYTHING] = 42
    """Seeds order, initial weights and dropout."""
    storage_path: Annotated[PathText, Affects()] = "runs"
    """Folder of all runs; on several nodes a path that every node sees. Not a URL."""
