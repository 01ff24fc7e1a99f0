"""Recordings as files hold them → samples at the rate that a model hears."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.tasks.base import BadRow
from orchestrator.tasks.files import file_of, missing_file

if TYPE_CHECKING:
    import numpy as np


def open_sound(value: Any, column: str, rate_hz: int) -> np.ndarray | BadRow:
    """Return the samples of a recording (n,), its channels averaged, or why there are none.

    Args:
        value: a file's path, its bytes, `{bytes, path}`, or `{array, sampling_rate}`.
        column: names the value in messages.
        rate_hz: samples per second of the result; recordings of another rate are resampled.
    """
    import numpy as np

    found = _read(value, column)
    if isinstance(found, BadRow):
        return found
    samples, rate = found
    if not np.isfinite(samples).all():
        return BadRow(f"column {column!r} holds samples that are no numbers (NaN or infinite)")
    return _resampled(samples, rate, rate_hz)


def _read(value: Any, column: str) -> tuple[np.ndarray, int] | BadRow:
    """(samples (n,), samples per second)."""
    import numpy as np
    import soundfile

    if isinstance(value, dict) and value.get("array") is not None and value.get("sampling_rate"):
        array = np.asarray(value["array"], np.float32)
        if array.ndim != 1:
            return BadRow(f"column {column!r}: its array has {array.ndim} dimensions instead of 1")
        return array, int(value["sampling_rate"])
    source = file_of(value, column, "samples without a rate: give {array, sampling_rate}")
    if isinstance(source, BadRow):
        return source
    if isinstance(source, Path) and not source.is_file():
        return BadRow(f"column {column!r} cannot be read as audio: {missing_file(source)}")
    try:
        file = str(source) if isinstance(source, Path) else io.BytesIO(source)
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return BadRow(f"column {column!r} cannot be read as audio: {error}")
    return samples.mean(-1), int(rate)


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    import numpy as np

    if rate == wanted or not len(samples):
        return samples
    from scipy.signal import resample_poly

    shared = math.gcd(rate, wanted)
    found: np.ndarray = resample_poly(samples, wanted // shared, rate // shared)
    return found.astype(np.float32)
