"""Size of what autograd keeps for one row of fixed size, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FP32_BYTES = 4


def kept_values(model: Any, inputs: Mapping[str, torch.Tensor]) -> int:
    """Return the fp32 values that a forward pass keeps for the backward pass; 0 where it cannot be run.

    Every storage counts once, weights and buffers do not.

    Args:
        model: on the meta device, as it will be trained.
        inputs: tensors of one row on that device; none for tasks whose rows have no fixed size.
    """
    import torch

    if not inputs:
        return 0
    held = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # keys are unique only among tensors that exist

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        found[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    was_training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**inputs)
        del outputs
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return 0
    finally:
        model.train(was_training)
    return sum(size for key, size in found.items() if key not in held) // FP32_BYTES


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
