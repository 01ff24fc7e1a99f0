"""Read files of tensors without running code that they may hold.

`torch.load` with `weights_only=True` builds tensors, containers and numbers only. The classes below, all of
them plain values, are added: DeepSpeed 0.19 stores them beside its tensors, and NumPy's random state is an array.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.errors import CheckpointError


def load_tensors(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Return what `torch.save` wrote to `path`.

    Args:
        path: a file of a checkpoint.
        map_location: as for `torch.load`.
        mmap: map the file instead of reading it.

    Raises CheckpointError for a file that holds anything but values, or is no such file.
    """
    try:
        with torch.serialization.safe_globals(_value_classes()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch's reader raises what it stumbles over
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is not loaded: it is damaged, or holds code instead of values ({first})."
        ) from error


def _value_classes() -> list[Any]:
    """Return the classes that may be built beside tensors; DeepSpeed is imported where it is installed."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    array = (np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32)))  # type: ignore[attr-defined]
    return [*array, LossScaler, ZeroStageEnum, fragment_address]
