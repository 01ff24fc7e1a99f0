"""Images as files hold them → pixels of the size and mode that a model reads."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.tasks.base import BadRow
from orchestrator.tasks.files import file_of, missing_file

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters; a name's place is the number that image processors call it by (`resample`)."""
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
    AttributeError, MemoryError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
"""Errors that Pillow's decoders raise for damaged files."""


@dataclass(frozen=True)
class Geometry:
    """Resizing of an image: scaled, then center-cropped.

    `resize`: a side that the shorter one is scaled to, (height, width) that the image is scaled to
    whatever its shape, or None for `size` itself.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None
    resampling: str

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a scaled image; `transformers` rounds the longer side down."""
        if isinstance(self.resize, int):
            shorter = min(width, height)
            longer = int(self.resize * max(width, height) / shorter)
            return (self.resize, longer) if width <= height else (longer, self.resize)
        height, width = self.resize or self.size
        return width, height

    def apply(self, image: Image) -> Image:
        """Return the image scaled and cut; what it lacks at the sides is black."""
        from PIL import Image as images

        wanted = self.scaled_size(*image.size)
        if image.size != wanted:
            image = image.resize(wanted, images.Resampling(RESAMPLING.index(self.resampling)))
        height, width = self.size
        if image.size == (width, height):
            return image
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def open_image(value: Any, column: str, channels: int) -> Image | BadRow:
    """Return the image in mode RGB (3 channels) or L (1), upright, on white; or why there is none.

    Args:
        value: a file's path, its bytes, or `{bytes, path}`.
        column: names the value in messages.
        channels: 3 or 1.
    """
    source = file_of(value, column, "pixels as numbers: save each image as a file, such as PNG")
    if isinstance(source, BadRow):
        return source
    try:
        return _opened(source, channels)
    except FileNotFoundError:
        return BadRow(
            f"column {column!r} cannot be read as an image: {missing_file(Path(str(source)))}"
        )
    except UNREADABLE as error:
        return BadRow(f"column {column!r} cannot be read as an image: {error}")


def _opened(source: Path | bytes, channels: int) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    mode = "L" if channels == 1 else "RGB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", images.DecompressionBombWarning)
        try:
            file = images.open(source if isinstance(source, Path) else io.BytesIO(source))
        except images.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        with file:
            file.load()  # the first frame of an animation; raises for a truncated file
            image = ImageOps.exif_transpose(file)
            return _on_white(_eight_bits(image)).convert(mode)


def _eight_bits(image: Image) -> Image:
    """Scale values of 16 bits, or of floating point, to 0 to 255; Pillow's `convert` cuts them off."""
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np
    from PIL import Image as images

    values = np.asarray(image).astype(np.float64)
    highest = float(values.max(initial=0))
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or highest > 65535:
        raise ValueError(f"values outside 0 to 65535 (mode {image.mode})")
    # Integers are of 16 bits. Floating point has no such convention: 0 to 1, else 8 bits, else 16.
    scale = 1 / 257
    if image.mode == "F" and highest <= 255:
        scale = 255.0 if highest <= 1 else 1.0
    return images.fromarray(np.rint(values * scale).astype(np.uint8))


def _on_white(image: Image) -> Image:
    """Lay a transparent image on white; without it, what transparent pixels hide would show."""
    from PIL import Image as images

    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", image.size, "white"), image)


def pixels_of(image: Image, geometry: Geometry) -> np.ndarray:
    """Return values 0 to 255, (channels × height × width,)."""
    import numpy as np

    array = np.asarray(geometry.apply(image), dtype=np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    return np.ascontiguousarray(array.transpose(2, 0, 1)).ravel()
