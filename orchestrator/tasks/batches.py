"""From the values of rows to the tensors of a batch. Nothing here imports torch until it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


def pad(arrays: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """Stack 1-D integer arrays to (rows, longest), filled with `value` on the right."""
    import numpy as np
    import torch

    out = np.full((len(arrays), max(len(a) for a in arrays)), value, dtype=np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


def tokens_and_mask(arrays: Sequence[np.ndarray], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (rows, longest)."""
    import numpy as np

    return {
        "input_ids": pad(arrays, pad_id),
        "attention_mask": pad([np.ones(len(a), dtype=np.int64) for a in arrays], 0),
    }


def ragged(values: Sequence[Any]) -> np.ndarray:
    """An object array (rows,) of values of any kind and length."""
    import numpy as np

    out = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        out[i] = value
    return out
