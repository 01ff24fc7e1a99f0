"""The one padding token of a job, and the side of a row on which it does no harm.

See docs/decisions/0114-one-padding-token-chosen-once.md.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config
from orchestrator.model.tokenizer import vocabulary_size
from orchestrator.spec import JobSpec
from orchestrator.tasks.tokenizing import control_ids

if TYPE_CHECKING:
    import torch

Side = Literal["left", "right"]

_MEANT_FOR_IT = (re.compile("pad", re.IGNORECASE), re.compile("reserved|unused", re.IGNORECASE))
_PROBE_VOCABULARY = 32
_PROBE_PARAMETERS = 250_000_000
"""Larger models are not built for the probe; those with so wide a layer find their last token by its id."""
_PROBE_ROW, _PROBE_PADDING = 6, 3
_TOLERANCE = 1e-4


def padding_id(spec: JobSpec, labels: tuple[str, ...], tokenizer: Any) -> int:
    """Return the token that fills rows to one length: within the model's vocabulary, and in no text.

    The tokenizer's own; else the config's, where it is a control token; else a control token that is
    meant for it or reserved; else the end of text. Raises OrchestratorError where a classifier finds
    its last token by the padding and there is no such token.
    """
    config = load_config(spec, labels)
    if tokenizer is None:  # nothing is padded by a token; the config's own may be CTC's blank
        own = getattr(config, "pad_token_id", None)
        return own if isinstance(own, int) and own >= 0 else 0
    size = None if spec.model.resize_embeddings else vocabulary_size(config)
    for found in _candidates(config, tokenizer):
        if found is not None and found >= 0 and (size is None or found < size):
            return found
    if spec.task.pools and not config.is_encoder_decoder:
        raise OrchestratorError(
            f"the tokenizer {spec.model.tokenizer or spec.model.pretrained!r} has neither a padding token nor an "
            "end of text: rows of different length could not share a batch. Set `pad_token` in its "
            "tokenizer_config.json."
        )
    return 0  # no result depends on it: the mask hides padding


def _candidates(config: Any, tokenizer: Any) -> Iterator[int | None]:
    controls = control_ids(tokenizer)
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    yield tokenizer.pad_token_id
    if (own := getattr(config, "pad_token_id", None)) in controls:
        yield own
    for meant in _MEANT_FOR_IT:
        yield from (
            i for i, name in sorted(controls.items()) if i not in taken and meant.search(name)
        )
    yield tokenizer.eos_token_id
    yield tokenizer.sep_token_id
    yield tokenizer.unk_token_id


def set_tokens(model: Any, pad_token_id: int, target_start: Mapping[str, int]) -> None:
    """Tell a model the padding token, and what a target begins with (`tasks.tokenizing.target_start`).

    A model that places tokens by its padding token (RoBERTa) keeps the one that it was trained with.
    """
    keeps = _places_by_padding(model)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None or not keeps:
            config.pad_token_id = pad_token_id
        for name, value in target_start.items():
            if hasattr(config, name):
                setattr(config, name, value)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        for name, value in {"pad_token_id": pad_token_id, **target_start}.items():
            setattr(settings, name, value)


def _places_by_padding(model: Any) -> bool:
    """Tell whether positions are counted from the padding token's row of the position table."""
    return any(
        "position" in name and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )


def set_tokenizer_padding(tokenizer: Any, pad_token_id: int, side: Side) -> None:
    """Tell a tokenizer the padding token and its side."""
    if tokenizer.pad_token_id != pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    tokenizer.padding_side = side
    tokenizer.init_kwargs |= {"padding_side": side}


def padding_side(spec: JobSpec, labels: tuple[str, ...]) -> tuple[Side, str | None]:
    """Return the side of a row where padding changes no result, and a warning where both do.

    A classifier may read its first token, its last one, or the one before the padding. A small model of
    the same config is asked about a row alone and beside a longer one.
    """
    import torch

    if not spec.task.pools:
        return "right", None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _small(spec, load_config(spec, labels))
        if model is None or not _padding_matters(model, "right"):
            return "right", None
        if not _padding_matters(model, "left"):
            return "left", None
    return "right", (
        f"a row's result depends on how far it is padded: {model.config.model_type} does not hide padding "
        "entirely. batch.group_by_length=true keeps it short."
    )


def _small(spec: JobSpec, config: Any) -> Any:
    """A random model of the same shape with few layers and tokens; None where there can be none."""
    import torch
    import transformers

    auto = getattr(transformers, spec.task.auto_class)
    small = copy.deepcopy(config)
    for part in {id(c): c for c in (small, small.get_text_config())}.values():
        _shrink(part)
    for candidate in (small, config):
        try:
            with torch.device("meta"):
                model = auto.from_config(candidate)
            if sum(p.numel() for p in model.parameters()) <= _PROBE_PARAMETERS:
                return auto.from_config(candidate, dtype=torch.float32).eval()
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            AssertionError,
            RuntimeError,
        ):
            continue
    return None


def _shrink(config: Any) -> None:
    config.vocab_size = _PROBE_VOCABULARY
    for i, name in enumerate(("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id")):
        setattr(config, name, i)
    for name in ("decoder_start_token_id", "cls_token_id", "unk_token_id", "forced_eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 4)
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(NotImplementedError):  # computed from another field
                setattr(config, name, min(2, getattr(config, name)))
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:2]


def _padding_matters(model: Any, side: Side) -> bool:
    """Tell whether a row's outputs change with padding on that side."""
    import torch

    end = model.config.eos_token_id
    last = end if model.config.is_encoder_decoder else 5
    row = torch.tensor([[*range(5, 5 + _PROBE_ROW - 1), last]])
    filling = torch.full((1, _PROBE_PADDING), model.config.get_text_config().pad_token_id)
    ones, zeros = torch.ones_like(row), torch.zeros_like(filling)
    order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    try:
        with torch.no_grad():
            alone = model(input_ids=row, attention_mask=ones).logits
            padded = model(
                input_ids=torch.cat(order(row, filling), 1),
                attention_mask=torch.cat(order(ones, zeros), 1),
            ).logits
    except (ValueError, TypeError, IndexError, RuntimeError):
        return False  # it cannot be asked like this
    difference = (alone - padded).abs().max()
    return bool(difference > _TOLERANCE * alone.abs().max().clamp(min=1e-3))


def padded_on(batch: dict[str, torch.Tensor], side: Side) -> dict[str, torch.Tensor]:
    """Return the batch, whose rows are padded on the right, with the padding of each row on `side`."""
    import torch

    if side == "right" or "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"]
    width = mask.shape[1]
    places = (torch.arange(width)[None, :] + mask.sum(1, keepdim=True)) % width
    return {
        name: tensor.gather(1, places)
        if tensor.shape == mask.shape and name in _BY_TOKEN
        else tensor
        for name, tensor in batch.items()
    }


_BY_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids"})
