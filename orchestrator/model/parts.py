"""Parts of a model that train differently: head and layers, matrices and vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec
from orchestrator.spec.optimizers import OptimizerSpec
from orchestrator.spec.tuning import FullTuning, TuningSpec

if TYPE_CHECKING:
    import torch

_STACK = r"(?:^|\.)(?:layer|layers|h|block|blocks)"
STACK = re.compile(f"{_STACK}$")
"""The end of the name of a list of layers, as transformers' models have it."""
LAYER = re.compile(rf"{_STACK}\.(\d+)\.")
"""A layer's number inside a parameter's name."""

PROJECTION = "distillation_projection"
"""The module that is trained beside a model to compare its hidden states with a teacher's; not exported."""


@dataclass(frozen=True)
class Group:
    """Trainable parameters that share a rate and a decay."""

    lr_scale: float
    """Peak rate as a share of `optimizer.lr`."""
    spared: bool
    """Norms, biases and factors: neither decay nor penalty."""
    distance: int
    """Layers from the top, where they begin to move one by one; 0 where all do from the start."""
    names: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    """(name, value) of what the optimizer sets beside rate and decay."""


def no_decay(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter is left out of weight decay: norms, biases, and IA³'s factors, which begin at 1."""
    named = name.endswith(".bias") or "norm" in name.lower() or ".ia3_l." in name
    return named or len(shape) <= 1


def groups(model: Any, spec: JobSpec, lr: float) -> list[Group]:
    """The trainable parameters by rate, decay and when they begin to move, in the order of the model.

    `lr`: the peak rate. Raises OrchestratorError where `head_lr`, `layer_decay` or gradual unfreezing finds
    no such part.
    """
    scales = _lr_scales(model, spec.optimizer, lr)
    starts = starting_distances(model, spec.tuning)
    hidden = hidden_matrices(model) if _tells_apart(spec.optimizer) else frozenset()
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = no_decay(name, tuple(parameter.shape))
            settings = tuple(spec.optimizer.group_settings(name in hidden).items())
            key = (scales[name], spared, starts.get(name, 0), settings)
            found.setdefault(key, []).append(name)
    return [
        Group(scale, spared, distance, tuple(names), settings)
        for (scale, spared, distance, settings), names in found.items()
    ]


def _tells_apart(optimizer: OptimizerSpec) -> bool:
    return optimizer.group_settings(True) != optimizer.group_settings(False)


def hidden_matrices(model: Any) -> frozenset[str]:
    """Return the names of the trainable matrices inside the body: no embeddings, no head, two dimensions."""
    from torch import nn

    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    embedded = {id(p) for m in modules for p in m.parameters(recurse=False)}
    head = set(_outside_body(model))
    return frozenset(
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and p.ndim == 2
        and id(p) not in embedded
        and name not in head
        and not name.startswith(PROJECTION)
    )


def starting_distances(model: Any, tuning: TuningSpec) -> dict[str, int]:
    """Layers from the top per parameter, under gradual unfreezing; empty where all move from the start."""
    if not isinstance(tuning, FullTuning) or tuning.unfreeze_every_steps is None:
        return {}
    return distances([name for name, _ in model.named_parameters()], "tuning.unfreeze_every_steps")


def parameter_groups(model: torch.nn.Module, spec: JobSpec, lr: float) -> list[dict[str, Any]]:
    """`groups` as a torch optimizer takes them; `lr_scale`, `spared` and `distance` stay with each."""
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "spared": group.spared,
            "distance": group.distance,
            "weight_decay": 0.0 if group.spared else spec.optimizer.weight_decay,
            **dict(group.settings),
        }
        for group in groups(model, spec, lr)
    ]


def _lr_scales(model: Any, optimizer: OptimizerSpec, lr: float) -> dict[str, float]:
    """Share of `lr` per parameter name."""
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if optimizer.layer_decay < 1:
        found = distances(names, "optimizer.layer_decay")
        scales = {name: optimizer.layer_decay**distance for name, distance in found.items()}
    if optimizer.head_lr is not None:
        for name in head_names(model):
            scales[name] = optimizer.head_lr / lr
    return scales


def distances(names: Sequence[str], asked_by: str) -> dict[str, int]:
    """Return how many layers lie above each parameter, itself included: 0 for what follows the layers (the head),
    1 for the last layer, …; what comes before the first layer lies below all of them.

    An encoder's and a decoder's layers count each for themselves. `names` in the order of the model.
    Raises OrchestratorError, for the field `asked_by`, where no layers are found.
    """
    layers = {name: name[: found.end()] for name in names if (found := LAYER.search(name))}
    if not layers:
        raise OrchestratorError(
            f"{asked_by}: no layers are found in the names of the model's parameters "
            f"({', '.join(names[:3])}, …). Drop it."
        )
    stacks: dict[bool, list[str]] = {}
    for name, layer in layers.items():
        stack = stacks.setdefault(_in_decoder(name), [])
        if layer not in stack:
            stack.append(layer)
    below = max(map(len, stacks.values())) + 1
    begun: set[bool] = set()
    out = {}
    for name in names:
        side = _in_decoder(name)
        if name in layers:
            begun.add(side)
            out[name] = len(stacks[side]) - stacks[side].index(layers[name])
        else:
            out[name] = 0 if (side in begun if side in stacks else begun) else below
    return out


def _in_decoder(name: str) -> bool:
    return ".decoder." in f".{name}"


def head_names(model: Any) -> list[str]:
    """Names of the trainable parameters outside the model's body.

    Raises OrchestratorError where there are none, as in a language model whose output weights are
    its embeddings.
    """
    found = _outside_body(model)
    if not found:
        raise OrchestratorError(
            "optimizer.head_lr: the model has no trainable weights outside its body "
            "(tied output weights belong to the embeddings). Drop it, or use optimizer.layer_decay."
        )
    return found


def _outside_body(model: Any) -> list[str]:
    """Return the names of the trainable parameters outside the body; none where the model has no body."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper
    body = getattr(whole, getattr(whole, "base_model_prefix", ""), None)
    if body is None:
        return []
    inside = {id(p) for p in body.parameters()}
    outside = {id(p) for p in whole.parameters()} - inside  # virtual tokens are in neither
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [n for n, p in named if id(p) in outside and not n.startswith(PROJECTION)]
