"""Probe of a language model: its treatment of inputs, measured on a small copy on CPU.

See docs/decisions/0096-packing-is-probed.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.model.shrink import VOCABULARY, shrunken
from orchestrator.model.weights import quiet_transformers
from orchestrator.tasks.packing import Packing, model_inputs, row_inputs

if TYPE_CHECKING:
    import numpy as np
    import torch

TOLERANCE = 1e-5
"""Largest difference of logits that rounding explains, as a share of their size."""
LENGTHS = (9, 12)
"""Tokens of a probe's two documents: longer than a small window, of unlike parity."""
LARGEST = 300_000_000
"""Parameters of a copy that could not be made narrow: beyond, none is built."""
SPREAD = 0.3
"""Standard deviation of a copy's weights: large enough for one token to move another's logits."""


@dataclass(frozen=True)
class Probe:
    """Findings about a causal language model."""

    packing: Packing
    """How documents in one row can be kept apart; False where they cannot be."""
    why: str
    """What that rests on."""
    causal: bool | None = True
    """Later tokens leave earlier predictions alone; None where no copy could be built."""
    causal_as_decoder: bool = False
    """They would, with `is_decoder: true` in the config."""


def probe(config: Any, auto: Any, attention: str = "auto", wanted: Packing = True) -> Probe:
    """Probe a small copy of the model that `auto` builds of `config`.

    `attention`: the kernel that will be used. `wanted`: what to try first: positions alone, or the mask at once.
    """
    flash = attention.startswith("flash")
    kernel = {} if attention == "auto" or flash else {"attn_implementation": attention}
    with quiet_transformers():
        model = next(_copies(config, auto, kernel), None)
        if model is None:
            return Probe(False, "no small copy of the model could be built to probe it", None)
        if not _is_causal(model):
            return Probe(False, "it sees later tokens", False, _causal_as_decoder(config, auto))
        if flash:
            return Probe(
                False, f"model.attention = {attention} runs on GPUs only and cannot be probed"
            )
        for way in ("mask",) if wanted == "mask" else (True, "mask"):
            leak = _leak(model, way)
            if leak is not None and leak <= TOLERANCE:
                return Probe(way, _why(way))
    return Probe(False, "a document changes the predictions of its neighbor, with a mask too")


def _why(way: Packing) -> str:
    if way is True:
        return "position ids keep documents apart (probed on a small copy of the model)"
    return "position ids do not keep documents apart, a mask of blocks does (probed on a small copy of the model)"


def _copies(config: Any, auto: Any, kernel: dict[str, Any]) -> Iterator[Any]:
    """Small copies of the model that can be built and run, the smallest first."""
    import torch

    for small in (lambda: shrunken(config), lambda: shrunken(config, widths=False), lambda: config):
        try:
            made = small()
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(copy.deepcopy(made)).parameters())
            if size > LARGEST:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto.from_config(made, dtype=torch.float32, **kernel).eval()
                _spread(model)
            first, second = _documents(1)
            _logits(model, {"input_ids": torch.tensor([first + second])})
        except Exception:  # noqa: BLE001, a config of odd sizes fails in as many ways as there are models
            continue
        yield model


def _spread(model: Any) -> None:
    """Weights with which tokens move each other's logits, as those of a new model hardly do."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, SPREAD)


def _documents(seed: int) -> list[list[int]]:
    """Two documents of token ids that no config gives a meaning."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY - 1, n).tolist() for n in LENGTHS]


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits


def _is_causal(model: Any) -> bool:
    import torch

    first, second = _documents(1)
    other = _documents(2)[1]
    ids = torch.tensor([first + second, first + other])
    logits = _logits(model, {"input_ids": ids})[:, : len(first)]
    return _apart(logits[0], logits[1]) <= TOLERANCE


def _causal_as_decoder(config: Any, auto: Any) -> bool:
    if getattr(config, "is_decoder", None) is not False:
        return False
    changed = copy.deepcopy(config)
    changed.is_decoder = True
    model = next(_copies(changed, auto, {}), None)
    return model is not None and _is_causal(model)


def _leak(model: Any, way: Packing) -> float | None:
    """Return how much a document's logits depend on the one before it; None where the model does not take the inputs.

    Rows: two with unlike neighbors, and one with the document alone, which is padded.
    """
    first, second = _documents(1)
    other = _documents(2)[0]
    packed = [_row([first, second]), _row([other, second]), _row([second])]
    try:
        logits = _logits(model, model_inputs(model, row_inputs(packed, 0, way)))
        alone = _logits(model, model_inputs(model, row_inputs([_row([second])], 0, False)))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return None
    start = len(first)
    with_first, with_other = logits[0, start:], logits[1, start:]
    padded, whole = logits[2, : len(second)], alone[0]
    return max(_apart(whole, one) for one in (with_first, with_other, padded))


def _row(documents: list[list[int]]) -> dict[str, np.ndarray]:
    import numpy as np

    return {
        "input_ids": np.concatenate([np.array(one) for one in documents]),
        "doc_lengths": np.array([len(one) for one in documents]),
    }


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1))
