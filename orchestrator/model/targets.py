"""Modules that adapters go on, and modules that are trained whole beside them, found by the model's structure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEY_OR_VALUE = re.compile(r"(?i)(?:^|[._]|w)(?:k|v|kv|qkv|key|value)s?(?:$|[._])|c_attn$")
"""A name whose words hold a key or a value, alone or joined with the query: `k_proj`, `query_key_value`, `Wqkv`."""

Modules = dict[str, Any]
"""Name inside the model → module."""


def body_name(model: Any) -> str:
    """Name of the module that a task's head stands on; "" where the model has no such part."""
    name = getattr(model, "base_model_prefix", "")
    return name if name in dict(model.named_children()) else ""


def head_modules(model: Any) -> list[str]:
    """Children with parameters beside the body; none where the model is one part."""
    body = body_name(model)
    if not body:
        return []
    beside = ((name, m) for name, m in model.named_children() if name != body)
    return [name for name, module in beside if any(True for _ in module.parameters())]


def adaptable(model: Any) -> Modules:
    """Layers with a matrix in the body's stacks of layers: linear ones, or convolutions where there are none.

    Left out: heads, embeddings, parts of torch's MultiheadAttention (which reads their weights without calling
    them), and what only chooses among experts: an adapter there would move rows between experts.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for kinds in ((nn.Linear, Conv1D), (nn.Conv1d, nn.Conv2d)):
        everywhere = dict(_inside_body(model, kinds))
        stacked = {name: m for name, m in everywhere.items() if _in_stack(model, name)}
        if found := stacked or everywhere:
            return found
    return {}


def _inside_body(model: Any, kinds: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    from torch import nn

    body, heads = body_name(model), head_modules(model)
    output = model.get_output_embeddings()
    modules = dict(model.named_modules())
    fused = [n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    for name, module in modules.items():
        if not isinstance(module, kinds) or module is output:
            continue
        if body and not name.startswith(f"{body}."):
            continue
        if any(_is_below(name, other) for other in (*heads, *fused)):
            continue
        if not _chooses_expert(modules[name.rpartition(".")[0]], module) and _groups(module) == 1:
            yield name, module


def _groups(module: Any) -> int:
    return int(getattr(module, "groups", 1))


def _is_below(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _chooses_expert(parent: Any, module: Any) -> bool:
    """Tell whether a linear layer gives one number per expert, or one for all, beside the experts themselves."""
    experts = [m for n, m in parent.named_children() if "expert" in n and m is not module]
    outputs = getattr(module, "out_features", None)
    if outputs is None or not experts:
        return False
    sizes = {len(m) for m in experts if hasattr(m, "__len__")}
    sizes |= {p.shape[0] for m in experts for p in m.parameters(recurse=False)}
    return outputs == 1 or outputs in sizes


def _in_stack(model: Any, name: str) -> bool:
    """Tell whether a module lies in a list of layers."""
    from torch import nn

    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(model.get_submodule(one), nn.ModuleList) for one in above)


def narrowed(found: Modules, known: Collection[str]) -> Modules:
    """Those of `found` whose names end as one of `known` does."""
    return {
        name: m
        for name, m in found.items()
        if any(name == end or name.endswith(f".{end}") for end in known)
    }


def feed_forward(found: Modules) -> Modules:
    """Linear layers that give back a wider layer's features to the stack: the end of a feed-forward block.

    Layers beside others that make keys or values belong to attention, whatever their widths.
    """
    attends = {_parent(name) for name in found if _is_key_or_value(name)}
    sizes = {name: _sizes(m) for name, m in found.items() if _parent(name) not in attends}
    return {name: found[name] for name, (inputs, outputs) in sizes.items() if inputs > outputs}


def without_experts(model: Any, found: Modules) -> Modules:
    """`found` without the feed-forward blocks that hold experts, where those are slices of one parameter.

    peft takes the names of layers in such blocks to mean the experts as well, on which not all kinds of
    adapters work.
    """
    sliced = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in _parent(n)]
    blocks = {_unnumbered(_parent(_parent(name))) for name in sliced}
    inside = {n for n in found if any(_is_below(_unnumbered(n), block) for block in blocks)}
    return {name: m for name, m in found.items() if name not in inside} or found


def _unnumbered(name: str) -> str:
    """A name without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_key_or_value(name: str) -> bool:
    return bool(KEY_OR_VALUE.search(name.rpartition(".")[2]))


def keys_and_values(found: Modules) -> Modules:
    """Layers that make keys or values, by name; all that are no end of a feed-forward block, without such."""
    named = {name: module for name, module in found.items() if _is_key_or_value(name)}
    ends = feed_forward(found)
    inner = {name: module for name, module in found.items() if name not in ends}
    return named or inner or found


def _sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a layer with a matrix."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "in_channels"):
        return module.in_channels, module.out_channels
    inputs, outputs = module.weight.shape  # transformers' Conv1D
    return inputs, outputs


def endings(wanted: Collection[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of the names `wanted` that no other name shares, as peft matches names."""
    wanted = set(wanted)
    taken = {end for name in others if name not in wanted for end in _ends(name)}
    return sorted({next((e for e in _ends(n) if e not in taken), n) for n in wanted})


def _ends(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))


def whole_modules(model: torch.nn.Module, names: Collection[str]) -> tuple[list[str], list[str]]:
    """(the largest modules that hold nothing but the parameters `names`, those of `names` in none).

    The latter belong to a module that holds others too.
    """
    owned: Mapping[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if name and _only(name, module, names)
    }
    largest = [name for name in owned if not any(_is_below(name, other) for other in owned)]
    loose = [name for name in sorted(names) if not any(_is_below(name, o) for o in largest)]
    return largest, loose


def _only(prefix: str, module: Any, names: Collection[str]) -> bool:
    """Tell whether all parameters of a module are among `names`, and it has some."""
    held = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    return bool(held) and all(name in names for name in held)
