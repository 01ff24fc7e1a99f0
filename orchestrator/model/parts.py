"""Parts of a model that train differently: head and layers, matrices and vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec.optimizer import OptimizerSpec

if TYPE_CHECKING:
    import torch

LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")
"""A layer's number inside a parameter's name, as transformers' models have it."""


@dataclass(frozen=True)
class Group:
    """Trainable parameters that share a rate and a decay."""

    lr_scale: float
    """Peak rate as a share of `optimizer.lr`."""
    spared: bool
    """Norms and biases: neither decay nor penalty."""
    names: tuple[str, ...]


def no_decay(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is left out of weight decay: norms and biases."""
    return len(shape) <= 1 or name.endswith(".bias") or "norm" in name.lower()


def groups(model: Any, optimizer: OptimizerSpec, lr: float) -> list[Group]:
    """The trainable parameters by rate and decay, in the order of the model. `lr`: the peak rate.

    Raises OrchestratorError where `head_lr` or `layer_decay` finds no such part.
    """
    scales = _lr_scales(model, optimizer, lr)
    found: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (scales[name], no_decay(name, tuple(parameter.shape)))
            found.setdefault(key, []).append(name)
    return [Group(scale, spared, tuple(names)) for (scale, spared), names in found.items()]


def parameter_groups(
    model: torch.nn.Module, optimizer: OptimizerSpec, lr: float
) -> list[dict[str, Any]]:
    """`groups` as a torch optimizer takes them; `lr_scale` and `spared` stay with each."""
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "spared": group.spared,
            "weight_decay": 0.0 if group.spared else optimizer.weight_decay,
        }
        for group in groups(model, optimizer, lr)
    ]


def _lr_scales(model: Any, optimizer: OptimizerSpec, lr: float) -> dict[str, float]:
    """Share of `lr` per parameter name."""
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if optimizer.layer_decay < 1:
        top, depths = _depths(names)
        scales = {name: optimizer.layer_decay ** (top - depths[name]) for name in names}
    if optimizer.head_lr is not None:
        for name in head_names(model):
            scales[name] = optimizer.head_lr / lr
    return scales


def _depths(names: list[str]) -> tuple[int, dict[str, int]]:
    """(depth of the head, depth per name): 0 for what comes before the first layer, then 1, 2, …

    An encoder's and a decoder's layers count from 1 each.
    """
    layers = {name: int(found[1]) + 1 for name in names if (found := LAYER.search(name))}
    if not layers:
        raise OrchestratorError(
            "optimizer.layer_decay: no layers are found in the names of the model's parameters "
            f"({', '.join(names[:3])}, …). Drop it."
        )
    top, seen, depths = max(layers.values()) + 1, False, {}
    for name in names:
        seen = seen or name in layers
        depths[name] = layers.get(name, top if seen else 0)
    return top, depths


def head_names(model: Any) -> list[str]:
    """Names of the trainable parameters outside the model's body.

    Raises OrchestratorError where there are none, as in a language model whose output weights are
    its embeddings.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper
    body = getattr(whole, getattr(whole, "base_model_prefix", ""), None)
    inside = {id(p) for p in body.parameters()} if body is not None else set()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = [n for n, p in named if id(p) not in inside]
    if body is None or not found:
        raise OrchestratorError(
            "optimizer.head_lr: the model has no trainable weights outside its body "
            "(tied output weights belong to the embeddings). Drop it, or use optimizer.layer_decay."
        )
    return found
