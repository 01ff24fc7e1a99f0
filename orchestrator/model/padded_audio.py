"""Probe of a speech model: does it compute a recording alike alone and padded beside a longer one?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.normalization import hold_statistics, norm_real_frames
from orchestrator.model.weights import quiet_transformers
from orchestrator.spec import JobSpec

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Largest difference of logits that rounding explains, as a share of their size."""
LAYERS = 2
"""Layers of the copy that is run."""
FRAMES = (12, 19)
"""Outputs of the two recordings."""


def check_padding(model: Any, spec: JobSpec) -> None:
    """Raise OrchestratorError where padding changes results and the job puts several rows in a batch.

    Some models let padded frames into real ones (convolutions in or before their layers that no mask
    covers). A copy with few layers and random weights is run on CPU; `model` itself may be on the meta device.
    """
    if "input_values" not in spec.task.required_inputs or spec.batch.micro_batch_size == 1:
        return
    difference = _difference(model, spec)
    if difference is not None and difference > TOLERANCE:
        raise OrchestratorError(
            f"model: {model.config.model_type} computes a recording otherwise beside a longer one (its logits "
            f"change by {difference:.0%}: padding reaches real frames). Set batch.micro_batch_size=1, so that "
            "nothing is padded, or choose a model such as wav2vec2, hubert or wavlm."
        )


def _difference(model: Any, spec: JobSpec) -> float | None:
    """Largest difference of logits that padding makes, as a share of their size; None where no copy can be run."""
    import torch

    config = copy.deepcopy(model.config)
    try:
        config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
        with quiet_transformers(), torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(0)
            small = type(model)(config).float().eval()
            hold_statistics(small, _with_statistics(spec))
            norm_real_frames(small)
            return _measured(small, int(getattr(config, "inputs_to_logits_ratio", 320)))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _measured(small: Any, frame_samples: int) -> float:
    import torch

    short, long = (torch.randn(frames * frame_samples) for frames in FRAMES)
    padded = torch.zeros(2, len(long))
    padded[0, : len(short)], padded[1] = short, long
    mask = torch.ones(2, len(long), dtype=torch.long)
    mask[0, len(short) :] = 0
    alone = _logits(small, short[None], mask[:1, : len(short)])[0]
    beside = _logits(small, padded, mask)[0, : len(alone)]
    return float((beside - alone).abs().max() / alone.abs().max().clamp(min=1e-12))


def _logits(small: Any, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = small(input_values=values, attention_mask=mask).logits
    return found


def _with_statistics(spec: JobSpec) -> JobSpec:
    """The job with its batch norms held: the copy's weights are new whatever the job's are."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"batch_norm": "frozen"})})
