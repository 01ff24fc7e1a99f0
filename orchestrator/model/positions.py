"""The longest text that a model has positions for, and the longest row that a job prepares.

The limit is read off the model itself, built on the meta device: a table of learned positions ends somewhere,
whatever number its config carries, while relative positions have no end at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import own_config, raw_config
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import virtual_tokens

DEFAULT_MAX_LENGTH_TOKENS = 512
_TABLE = re.compile(
    r"(?:^|_)(?:wpe|pos(?:ition)?s?_?(?:emb|enc)\w*|emb\w*_pos\w*|position_enc\w*)$"
)
"""Name of a module or buffer that holds absolute positions, as transformers' models have it."""
_RELATIVE = re.compile(r"rel(?:ative)?_|bias|distance")
_LARGEST_OFFSET = 8
"""Positions before the first token that a table may reserve, with room to spare."""
_known: dict[str, Positions] = {}
"""By a config's fields: each model is built once per process."""


@dataclass(frozen=True)
class Positions:
    """Tokens that a model has positions for; None where there is no end to them."""

    text: int | None
    """Of the text that it reads."""
    target: int | None
    """Of the text that its decoder writes; None without a decoder of its own."""


def max_length_tokens(spec: JobSpec) -> int:
    """Return the longest row in tokens: the job's, or the model's limit, at most 512."""
    if spec.data.max_length_tokens != "auto":
        return spec.data.max_length_tokens  # needs no model: an export may outlive what it began as
    named = _named_limit(raw_config(spec))
    if named is None or named >= DEFAULT_MAX_LENGTH_TOKENS + _LARGEST_OFFSET + virtual_tokens(
        spec.tuning
    ):
        return DEFAULT_MAX_LENGTH_TOKENS
    return min(text_positions(spec) or DEFAULT_MAX_LENGTH_TOKENS, DEFAULT_MAX_LENGTH_TOKENS)


def check_max_length(spec: JobSpec) -> None:
    """Raise OrchestratorError where the job's rows may be longer than the model has positions."""
    limits, virtual = _positions(spec), virtual_tokens(spec.tuning)
    limit = text_positions(spec)
    if limit is not None and limit < 2:
        raise OrchestratorError(
            f"tuning.num_virtual_tokens = {virtual} leaves no room: the model has {limit + virtual} positions."
        )
    lengths: tuple[tuple[str, Any, int | None, int], ...] = (
        ("data.max_length_tokens", spec.data.max_length_tokens, limit, virtual),
        (
            "task.max_target_tokens",
            getattr(spec.task, "max_target_tokens", "auto"),
            limits.target,
            0,
        ),
    )
    for field, wanted, known, taken in lengths:
        less = f" (less tuning.num_virtual_tokens = {taken})" if taken else ""
        if wanted != "auto" and known is not None and wanted > known:
            raise OrchestratorError(
                f"{field} = {wanted} exceeds the model's {known} positions{less}: set {field}={known} or less."
            )


def text_positions(spec: JobSpec) -> int | None:
    """Return the tokens of a text that the model has positions for, None where there is no limit."""
    limit = _positions(spec).text
    return None if limit is None else limit - virtual_tokens(spec.tuning)


def _positions(spec: JobSpec) -> Positions:
    if not spec.task.reads_text:
        return Positions(None, None)
    config = own_config(spec).get_text_config()
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        _known[key] = positions_of(config)
    return _known[key]


def positions_of(config: Any) -> Positions:
    """Return the positions of the text model that `config` describes; no weights are made."""
    import torch
    from transformers import AutoModel

    named = _named_limit(config.to_dict())
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError):
        return Positions(named, named if config.is_encoder_decoder else None)
    sizes = [(name.startswith("decoder."), size) for name, size in _sizes(model, named)]
    text = [size for in_decoder, size in sizes if not in_decoder or not config.is_encoder_decoder]
    target = [size for in_decoder, size in sizes if in_decoder and config.is_encoder_decoder]
    return Positions(min(text, default=None), min(target, default=None))


def _named_limit(fields: dict[str, Any]) -> int | None:
    """The limit that a config names; models with relative positions may name one that is none."""
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(limit := fields.get(name), int) and limit > 0:
            return limit
    return None


def _sizes(model: Any, named: int | None) -> Iterator[tuple[str, int]]:
    """(name, usable positions) of every table of absolute positions, and of rotary ones by the config.

    A table whose padding row comes first (RoBERTa) begins behind it; one with an `offset` (OPT, BART)
    begins behind that.
    """
    import torch

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if named is not None and (
            "rotary" in name or "inv_freq" in dict(module.named_buffers(recurse=False))
        ):
            yield path, named
        if _RELATIVE.search(name):
            continue
        if _TABLE.search(name):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 2:
                yield path, _usable(module, weight, named)
            elif (
                named is not None
            ):  # computed as they are needed; trained as far as the config says
                yield path, named
        for key, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items():
            if _TABLE.search(key) and isinstance(value, torch.Tensor) and value.dim() == 2:
                yield f"{path}.{key}", int(value.shape[0])


def _usable(module: Any, weight: Any, named: int | None) -> int:
    padding = getattr(module, "padding_idx", None)
    before = int(getattr(module, "offset", 0)) + (0 if padding is None else padding + 1)
    usable = int(weight.shape[0]) - before
    return usable if named is None else min(usable, named)
