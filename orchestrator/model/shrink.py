"""A small copy of a model's config: same code, same kinds of layers, few and narrow ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

VOCABULARY = 64
HIDDEN, HEADS, HEAD_WIDTH = 32, 4, 8
PERIODIC_LAYERS = 9
"""Layers where kinds alternate by a number in the config: at least one of each."""
WINDOW = 4
"""Tokens of a sliding window and of a chunk, so that rows of a dozen tokens are longer."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx")
ROOM = 64
"""Positions of a small copy, at least: rows of a probe hold two documents."""
PERIODS = (
    "period",
    "interval",
    "_indices",
    "layer_ids",
    "every_n",
    "freq",
    "sparse_step",
    "_stride",
)
SIZES = (
    "size",
    "dim",
    "embd",
    "model",
    "inner",
    "hidden",
    "width",
    "rank",
    "channels",
    "d_ssm",
    "lru",
)
NO_SIZES = (
    "vocab",
    "window",
    "chunk",
    "image",
    "patch",
    "kernel",
    "batch",
    "block",
    "table",
    "type_",
    "state",
)


def shrunken(config: Any, widths: bool = True) -> Any:
    """A copy of a `transformers` config with few layers, tokens and experts, and narrow ones if `widths`.

    Every kind of layer stays, and so do all flags. The copy may be one that its model refuses: sizes that have
    to fit each other are known by usual relations only.
    """
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink_depth(part)
        _shrink_counts(part)
        if widths:
            _shrink_widths(part)
    return small


def _parts(config: Any) -> Iterator[Any]:
    """The config and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None and hasattr(inner, "to_dict"):
            yield from _parts(inner)


def _first(config: Any, names: tuple[str, ...]) -> tuple[str, int]:
    """(name, value) of the first field that holds a number; ("", 0) without one."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return name, value
    return "", 0


def _set(config: Any, name: str, value: Any) -> None:
    """Set a field where the config has one of its own by that name; computed ones follow by themselves."""
    try:
        setattr(config, name, value)
    except (AttributeError, TypeError, ValueError):
        return


def _shrink_depth(config: Any) -> None:
    """Keep the first layer of each kind, two at least."""
    fields = config.to_dict()
    name, depth = _first(config, DEPTHS)
    if not name:
        return
    per_layer = {
        k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == depth > 1
    }
    if per_layer:
        kinds = list(zip(*(map(repr, values) for values in per_layer.values()), strict=True))
        keep = sorted({kinds.index(kind) for kind in kinds})
        keep = keep if len(keep) > 1 else list(range(min(2, depth)))
        if getattr(config, "num_kv_shared_layers", 0):  # the last layers use keys of earlier ones
            config.num_kv_shared_layers = len(keep)
            per_layer = {key: [values[i] for i in keep] * 2 for key, values in per_layer.items()}
            keep = list(range(2 * len(keep)))
    else:
        periodic = any(part in key for key in fields for part in PERIODS)
        keep = list(range(min(depth, PERIODIC_LAYERS if periodic else 2)))
    for key, values in per_layer.items():
        _set(config, key, [values[i] for i in keep])
    for key, values in fields.items():
        if key not in per_layer and any(
            part in key for part in ("indices", "layer_ids", "only_layers")
        ):
            _set(config, key, _still_there(values, len(keep)))
    for key in DEPTHS:
        if getattr(config, key, None) == depth:
            _set(config, key, len(keep))
    if fields.get("first_k_dense_replace"):
        _set(config, "first_k_dense_replace", 1)


def _still_there(numbers: Any, depth: int) -> Any:
    """Numbers of layers below `depth`; the last one where all lay beyond."""
    if not numbers or not all(isinstance(n, int) for n in numbers):
        return numbers
    return [n for n in numbers if n < depth] or [depth - 1]


def _shrink_counts(config: Any) -> None:
    """Few tokens, experts and positions of a window."""
    for key, value in config.to_dict().items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if key.endswith("token_id") or key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            _set(config, key, min(value, 2) if value >= VOCABULARY else value)
        elif key.startswith("vocab_size"):
            _set(config, key, min(value, VOCABULARY))
        elif key in POSITIONS:
            _set(config, key, max(value, ROOM))
        elif "experts_per_tok" in key or key in ("top_k_experts", "moe_k", "moe_topk", "moe_top_k"):
            _set(config, key, min(value, 2))
        elif key in ("n_group", "topk_group"):
            _set(config, key, 1)
        elif "expert" in key and ("num" in key or key.startswith("n_")) and "shared" not in key:
            _set(config, key, min(value, 4))
        elif key in ("sliding_window", "window_size", "attention_chunk_size") and value > WINDOW:
            _set(config, key, WINDOW)
    if isinstance(getattr(config, "eos_token_id", None), list):
        config.eos_token_id = 2


def _shrink_widths(config: Any) -> None:
    """Narrow layers: sizes keep their ratio to the hidden size, heads to each other."""
    hidden, heads = _first(config, WIDTHS)[1], _first(config, HEAD_COUNTS)[1]
    if not hidden:
        return
    fields = config.to_dict()
    head = fields.get("head_dim") or (hidden // heads if heads else 0)
    ratio = heads * head / hidden if heads and head else 1
    new_heads = min(heads, HEADS) or HEADS
    new_head = max(4, 2 * round(ratio * HIDDEN / new_heads / 2))
    if "qk_rope_head_dim" in fields:  # the part of a head that turns, as rotary embeddings know it
        new_head = min(fields["qk_rope_head_dim"], 4)
    for key, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            new = _narrow(key, value, hidden, heads, head, new_heads, new_head)
            if new is not None:
                _set(config, key, new)
        elif isinstance(value, dict) and ("rope" in key):
            _set(config, key, _narrow_rope(value, new_head))


def _narrow(
    key: str, value: int, hidden: int, heads: int, head: int, new_heads: int, new_head: int
) -> int | None:
    """The small value of a field; None for fields that stay."""
    if key in HEAD_COUNTS and value == heads:
        return new_heads
    if key in SHARED_HEADS:
        return new_heads if value == heads else min(value, 2 if value > 1 else 1)
    if key == "head_dim" or (
        key in ("d_kv", "kv_channels", "attention_head_dim") and value == head
    ):
        return new_head
    if key in ("qk_rope_head_dim", "rotary_dim", "qk_rope_dim"):
        return min(value, 4)
    if key.endswith(("head_dim", "d_head")):
        return 2 * HIDDEN // HEADS if "mamba" in key else HEAD_WIDTH
    if key == "mamba_d_ssm":
        return 2 * HIDDEN
    if key.endswith(("_n_heads", "_num_heads", "num_value_heads")):
        return HEADS
    if key.endswith("num_key_heads"):
        return HEADS // 2
    if key.endswith("n_groups"):
        return 1
    if key.endswith("rank") and value:
        return min(value, 8)
    if key.endswith("d_state") or key in ("state_size", "ssm_state_size"):
        return min(value, HEAD_WIDTH)
    named = any(part in key for part in SIZES) and not any(part in key for part in NO_SIZES)
    if not named or value < HIDDEN:
        return None
    return max(HEAD_WIDTH, -(-value * HIDDEN // hidden // HEAD_WIDTH) * HEAD_WIDTH)


def _narrow_rope(settings: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary settings whose lists have one number per pair of a head's features."""
    out = dict(settings)
    for key, value in settings.items():
        if isinstance(value, dict):
            out[key] = _narrow_rope(value, head)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            rotated = int(head * settings.get("partial_rotary_factor", 1)) // 2
            out[key] = value[:rotated]
        elif key == "mrope_section" and isinstance(value, list):
            out[key] = [head // 2 - 2 * (head // 8), head // 8, head // 8][: len(value)]
    return out
