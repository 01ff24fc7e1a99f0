"""A pretrained model's own image processor: what it does to images, found by giving it some.

Processors differ in what their fields mean (ConvNeXt's `crop_pct`, LeViT's factor of 256/224, EfficientNet's
second division), so their fields only suggest values, and images decide which are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError
from orchestrator.tasks.images import RESAMPLING, Geometry

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FILE = "preprocessor_config.json"
CLOSE = 0.6
"""Largest mean difference of pixels (of 0 to 255) between a processor's result and ours."""
FIELDS = "task.size_pixels, resize_pixels, resampling, mean, std and channel_order"


@dataclass(frozen=True)
class Scaling:
    """Preprocessing of an image: its geometry, then (value / 255 − mean) / std per channel."""

    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    source: str
    """Says where it comes from, as the plan shows it."""


def own_scaling(source: str, revision: str | None, config: Mapping[str, Any]) -> Scaling | None:
    """Return how the images of a pretrained model are scaled, or None where nothing says so.

    Args:
        source: folder or hub id of the model.
        revision: branch, tag or commit on the hub.
        config: the model's own config.

    Raises:
        OrchestratorError: there is an image processor, and it cannot be loaded or followed.
    """
    if timm := config.get("pretrained_cfg"):
        return _of_timm(timm)
    processor = _load(source, revision)
    return None if processor is None else _probed(processor)


def usual_scaling(config: Mapping[str, Any]) -> Scaling:
    """Return ViT's scaling, at the size that a model's config names, else at 224 pixels."""
    size = config.get("image_size")
    height = width = size if isinstance(size, int) else 224
    if isinstance(size, list | tuple) and len(size) == 2:
        height, width = size
    return Scaling(Geometry((height, width), None, "bilinear"), (0.5,), (0.5,), False, "ViT's")


def _load(source: str, revision: str | None) -> Any:
    from transformers import AutoImageProcessor

    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file() for name in (FILE, "processor_config.json")
    ):
        return None
    try:
        return AutoImageProcessor.from_pretrained(
            source, revision=revision, backend="pil", trust_remote_code=False
        )
    except OSError:
        return None
    except (ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unusable(
            source, f"cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def _unusable(name: str, why: str) -> OrchestratorError:
    return OrchestratorError(
        f"model.pretrained: its image processor ({name}, {FILE}) {why}. Set {FIELDS} to go without it."
    )


def _probed(processor: Any) -> Scaling:
    """Return the processor's settings, measured with images of one color and of noise."""
    import numpy as np
    from PIL import Image

    name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    try:
        colors = ((0, 0, 0), (255, 255, 255), (255, 0, 0))
        wide = [_processed(processor, Image.new("RGB", (97, 64), c)) for c in colors]
        noise = [_noise(wide[0].shape[1:], turned) for turned in (False, True)]
        found = [_processed(processor, image) for image in noise]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise _unusable(
            name, f"cannot be followed: {str(error).strip().splitlines()[0]}"
        ) from error
    if any(one.shape != wide[0].shape for one in (*wide, *found)):
        raise _unusable(name, "gives images of several sizes")
    middle = tuple(side // 2 for side in wide[0].shape[1:])
    black, white, red = (one[(slice(None), *middle)].astype(np.float64) for one in wide)
    std = 1 / (white - black)
    mean = -black * std
    bgr = bool(np.isclose(red[-1], white[-1]) and not np.isclose(red[0], white[0]))
    fields = processor.to_dict()
    own_mean, own_std = (
        _written(fields.get(name), measured)
        for name, measured in (("image_mean", mean), ("image_std", std))
    )
    scale = (slice(None), None, None)
    pixels = [(one * std[scale] + mean[scale]) * 255 for one in found]
    pixels = [one[::-1] if bgr else one for one in pixels]
    geometry = _geometry(fields, pixels, noise)
    if geometry is None:
        raise _unusable(name, "scales or cuts images in a way that is not known here")
    return Scaling(geometry, own_mean, own_std, bgr, f"{name} of the model's {FILE}")


def _processed(processor: Any, image: Image) -> np.ndarray:
    """Values (channels, height, width)."""
    import numpy as np

    values = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    if values.ndim != 4:
        raise ValueError(f"it gives {values.ndim - 1} dimensions per image")
    array: np.ndarray = values[0]
    return array


def _noise(size: tuple[int, ...], turned: bool) -> Image:
    """Random pixels, larger than `size` and of another shape."""
    import numpy as np
    from PIL import Image

    height, width = int(size[0] * 1.3) + 7, int(size[1] * 1.7) + 5
    if turned:
        height, width = width, height
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def _written(value: Any, measured: np.ndarray) -> tuple[float, ...]:
    """The processor's own figures where they say what was measured, to keep every digit."""
    import numpy as np

    own = [value] if isinstance(value, int | float) else value
    if isinstance(own, list | tuple) and len(own) in (1, len(measured)):
        full = np.array(own, np.float64) * np.ones_like(measured)
        if np.allclose(full, measured, atol=1e-5):
            return tuple(float(one) for one in full)
    return tuple(float(f"{one:.8g}") + 0.0 for one in measured)


def _geometry(
    fields: Mapping[str, Any], pixels: list[np.ndarray], images: list[Image]
) -> Geometry | None:
    """The first candidate that gives the processor's pixels."""
    import numpy as np

    _, height, width = pixels[0].shape
    code = fields.get("resample")
    first = RESAMPLING[int(code)] if code is not None and int(code) < len(RESAMPLING) else ""
    for resampling in sorted(RESAMPLING, key=lambda one: one != first):
        for resize in _resizes(fields):
            candidate = Geometry((height, width), resize, resampling)
            ours = (np.asarray(candidate.apply(image)).transpose(2, 0, 1) for image in images)
            differences = (np.abs(a - b).mean() for a, b in zip(ours, pixels, strict=True))
            if max(differences) <= CLOSE:
                return candidate
    return None


def _resizes(fields: Mapping[str, Any]) -> Iterator[int | tuple[int, int] | None]:
    """Values of `Geometry.resize` that a processor's fields suggest."""
    yield None
    size = fields.get("size")
    size = dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}
    if size.get("height") and size.get("width"):
        yield int(size["height"]), int(size["width"])
    if edge := size.get("shortest_edge"):
        yield int(edge)
        yield int(edge), int(edge)
        yield int(256 / 224 * edge)
        if share := fields.get("crop_pct"):
            yield int(edge / share)


def _of_timm(fields: Mapping[str, Any]) -> Scaling:
    """The scaling of evaluation that timm's models name in their config (`pretrained_cfg`)."""
    _, height, width = fields.get("test_input_size") or fields.get("input_size") or (3, 224, 224)
    share = fields.get("test_crop_pct") or fields.get("crop_pct") or 1.0
    scaled = (int(height / share), int(width / share))
    keeps_shape = fields.get("crop_mode", "center") == "center" and height == width
    resize = scaled[0] if keeps_shape else scaled
    resampling = str(fields.get("interpolation") or "bicubic")
    if resampling not in RESAMPLING or fields.get("crop_mode", "center") not in (
        "center",
        "squash",
    ):
        what = f"{resampling}, {fields.get('crop_mode')}"
        raise OrchestratorError(f"model: its pretrained_cfg scales images by {what}: set {FIELDS}.")
    geometry = Geometry((height, width), resize, resampling)
    mean, std = (
        tuple(float(v) for v in fields.get(name) or usual)
        for name, usual in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
    )
    return Scaling(geometry, mean, std, False, "pretrained_cfg of the model's config.json")
