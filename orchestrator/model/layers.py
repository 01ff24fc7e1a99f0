"""A model's stack of layers: where it is, and a model that keeps only some of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.parts import STACK

if TYPE_CHECKING:
    import torch


def layer_stack(model: torch.nn.Module, asked_by: str) -> tuple[str, torch.nn.ModuleList]:
    """(name inside `model`, layers) of the one stack that rows pass through.

    Raises OrchestratorError, in the name of the field that asks, where there is none, or more than one.
    """
    from torch import nn

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and STACK.search(name)
    ]
    outermost = [
        one for one in found if not any(one[0].startswith(f"{other}.") for other, _ in found)
    ]
    if len(outermost) != 1:
        names = ", ".join(name for name, _ in outermost) or "none"
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise OrchestratorError(
            f"{asked_by}: needs a model with one stack of layers, and {kind} has {len(outermost)} "
            f"({names}). Drop it."
        )
    return outermost[0]


def keep_layers(model: Any, keep: Sequence[int]) -> None:
    """Drop all layers but those numbered `keep` (from 0), in place; the config follows.

    Raises OrchestratorError for a number that is no layer, and on the meta device where the config cannot
    describe what is left: the exported model would not load.
    """
    import torch
    from torch import nn

    name, layers = layer_stack(model, "model.keep_layers")
    if beyond := [number for number in keep if number >= len(layers)]:
        raise OrchestratorError(
            f"model.keep_layers = {beyond[0]}: {model.config.model_type} has {len(layers)} layers, "
            f"0 to {len(layers) - 1}."
        )
    kept = nn.ModuleList(layers[number] for number in keep)
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", number)  # noqa: B010, the place in a cache of keys and values
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, kept)
    config = model.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) == len(layers):
        config.layer_types = [kinds[number] for number in keep]
    config.num_hidden_layers = len(keep)
    if model.device.type != "meta":
        return  # the plan has looked
    with torch.device("meta"):
        described = type(model)(config)
    if _shapes(described) != _shapes(model):
        raise OrchestratorError(
            f"model.keep_layers = {list(keep)}: {config.model_type} has layers of several kinds, and its config "
            "cannot describe a model of these alone. Keep the first layers, or drop it."
        )


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class LayerOutputs:
    """Outputs of chosen layers (numbered from 1) in the last forward pass: `states`, (rows, tokens, width) each.

    Raises OrchestratorError where the model has no such layers.
    """

    def __init__(self, model: torch.nn.Module, numbers: Sequence[int], asked_by: str) -> None:
        self.states: dict[int, torch.Tensor] = {}
        for number in numbers:
            layer = layer_stack(model, asked_by)[1][number - 1]
            layer.register_forward_hook(partial(self._record, number))

    def _record(self, number: int, module: Any, inputs: Any, output: Any) -> None:
        self.states[number] = output[0] if isinstance(output, tuple) else output
