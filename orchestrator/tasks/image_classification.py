"""Single-label image classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from orchestrator.effects import Affects, Effect
from orchestrator.errors import Problem
from orchestrator.tasks.base import (
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    SoftTargets,
)
from orchestrator.tasks.default_lr import BY_SIZE, IMAGE_NEW, IMAGE_TUNED, Rate
from orchestrator.tasks.image_processor import Scaling, own_scaling, usual_scaling
from orchestrator.tasks.images import RESAMPLING, Geometry, open_image, pixels_of
from orchestrator.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    import torch


Side = Annotated[int, Field(ge=1)]
Size = Side | tuple[Side, Side]
SETTINGS = ("size_pixels", "resize_pixels", "resampling", "channel_order", "mean", "std")
"""Fields that are the model's own unless the job names others."""


class ImageClassification(SingleLabel):
    """One label per image. Images are scaled once, when rows are prepared."""

    type: Literal["image_classification"]
    image_column: str = "image"
    """Column with the image: a file's path, its bytes, or `{bytes, path}` as `datasets` writes them."""
    size_pixels: Size | Literal["auto"] = "auto"
    """Height and width of the model's images: one number, or `[height, width]`. `auto`: the model's own."""
    resize_pixels: Size | Literal["auto"] | None = "auto"
    """Size that an image is scaled to before the middle of `size_pixels` is cut out: a number for its shorter side,
    or `[height, width]`. `null`: scaled to `size_pixels`, nothing is cut. `auto`: the model's own, in proportion."""
    resampling: Literal["auto", "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = (
        "auto"
    )
    """Filter for scaling. `auto`: the model's own."""
    channels: Literal[1, 3] = 3
    """3: red, green and blue; 1: grey."""
    channel_order: Annotated[Literal["auto", "rgb", "bgr"], Affects(Effect.TRAINING)] = "auto"
    """Order of three channels. `auto`: the model's own."""
    mean: Annotated[tuple[float, ...] | Literal["auto"], Affects(Effect.TRAINING)] = "auto"
    """Mean that is subtracted from pixels of 0 to 1, per channel or one for all. `auto`: the model's own."""
    std: Annotated[tuple[float, ...] | Literal["auto"], Affects(Effect.TRAINING)] = "auto"
    """Standard deviation by which pixels are divided after `mean` is subtracted. `auto`: the model's own."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline_tag: ClassVar[str] = "image-classification"
    peft_task: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    soft_targets: ClassVar[SoftTargets | None] = "classes"
    fixed_length: ClassVar[bool] = True
    own_of_model: ClassVar[tuple[str, ...]] = SETTINGS
    default_global_batch_size_source: ClassVar[str] = (
        "a start and no more: transformers' guide to image classification takes 64"
    )
    tuned_lrs: ClassVar[Mapping[str, Rate]] = IMAGE_TUNED
    new_lrs: ClassVar[BY_SIZE] = IMAGE_NEW
    sources: ClassVar[Mapping[str, str]] = dict.fromkeys(
        SETTINGS,
        "ViT's, for a model without an image processor: Dosovitskiy et al., arXiv 2010.11929",
    )
    _source: str = PrivateAttr(default="")

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from super().broken_rules(has_eval)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values != "auto" and len(values) not in (1, self.channels):
                yield Problem(
                    f"task.{name}", f"needs 1 or {self.channels} values", "one per channel", values
                )
        if self.std != "auto" and any(value <= 0 for value in self.std):
            yield Problem("task.std", "must be above 0", "", self.std)
        if self.channels == 1 and self.channel_order == "bgr":
            yield Problem("task.channel_order", "needs three channels", "drop it", "bgr")

    def filled(self, source: str | None, revision: str | None, config: Mapping[str, Any]) -> Self:
        own = own_scaling(source, revision, config) if source else None
        usual = own or usual_scaling(config)
        geometry, values = self._filled_geometry(usual.geometry), (usual.mean, usual.std)
        mean, std = ((v * self.channels if len(v) == 1 else v)[: self.channels] for v in values)
        height, width = geometry.size
        found: dict[str, Any] = {
            "size_pixels": height if height == width else (height, width),
            "resize_pixels": None if geometry.resize == geometry.size else geometry.resize,
            "resampling": geometry.resampling,
            "channel_order": "bgr" if usual.bgr and self.channels == 3 else "rgb",
            "mean": mean,
            "std": std,
        }
        copy = self.with_fields({name: found[name] for name in self.open_fields})
        copy._source = usual.source if own else ""
        return copy

    def _filled_geometry(self, own: Geometry) -> Geometry:
        """The model's geometry, at the job's size where it names one."""
        size, resize = own.size, own.resize
        if self.size_pixels != "auto":
            size = _pair(self.size_pixels)
            if resize is not None and size != own.size:
                share = max(mine / theirs for mine, theirs in zip(size, own.size, strict=True))
                scaled = [round(share * side) for side in _pair(resize)]
                resize = scaled[0] if isinstance(resize, int) else (scaled[0], scaled[1])
        return Geometry(size, resize, own.resampling)

    @property
    def default_sources(self) -> Mapping[str, str]:
        return dict.fromkeys(self.sources, self._source) if self._source else self.sources

    @property
    def scaling(self) -> Scaling:
        """Return the scaling of images. Open fields that no model has filled are ViT's, as in plans of old."""
        task: Any = self.filled(None, None, {}) if self.open_fields else self
        resize = task.resize_pixels
        geometry = Geometry(_pair(task.size_pixels), resize, task.resampling)
        return Scaling(geometry, task.mean, task.std, task.channel_order == "bgr", self._source)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.image_column, self.label_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.image_column,)

    def features(self) -> dict[str, FeatureKind]:
        return {"pixels": "bytes", "label": "int"}

    def length(self, row: EncodedRow) -> int:
        return 1

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i for i, label in enumerate(labels)}
        out: list[EncodedRow | BadRow] = []
        for row in rows:
            label = self.target(row.get(self.label_column), index)
            pixels = (
                label if isinstance(label, BadRow) else self._pixels(row.get(self.image_column))
            )
            if isinstance(pixels, BadRow):
                out.append(pixels)
            else:
                out.append({"pixels": pixels, "label": label, "n_targets": 1, "truncated": 0})
        return out

    def _pixels(self, value: Any) -> np.ndarray | BadRow:
        """Values 0 to 255 (channels × height × width,), or why there are none."""
        image = open_image(value, self.image_column, self.channels)
        return image if isinstance(image, BadRow) else pixels_of(image, self.scaling.geometry)

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        return {
            "pixel_values": self._values([row["pixels"] for row in rows]),
            "labels": self.target_tensor([row["label"] for row in rows]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def _values(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """(rows, channels, height, width) in fp32, scaled as the model expects."""
        import numpy as np
        import torch

        scaling = self.scaling
        shape = (len(pixels), self.channels, *scaling.geometry.size)
        values = torch.from_numpy(np.stack(pixels).reshape(shape)).float() / 255
        if scaling.bgr:
            values = values.flip(1)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (scaling.mean, scaling.std))
        return (values - mean) / std

    def scores(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scores:
        logits = _logits(model, batch["pixel_values"])
        return Scores(logits, batch["labels"], batch["weights"])

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = self.losses(_logits(model, batch["pixel_values"]), batch["labels"])
        return (losses * batch["weights"]).sum()

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        logits = _logits(model, batch["pixel_values"])
        losses = self.losses(logits, batch["labels"])
        return {"loss": losses.cpu().numpy(), **self.outcome(logits, batch["labels"])}

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        out = []
        for row in rows:
            value = row[self.image_column]
            named = {"image": value} if isinstance(value, str) else {}
            pixels = self._pixels(value)
            if isinstance(pixels, BadRow):
                out.append({**named, "label": None, "why": pixels.why})
                continue
            with torch.no_grad():
                logits = _logits(model, self._values([pixels]).to(model.device))
            out.append({**named, **self.prediction(logits[0], model.config.id2label)})
        return out

    def input_problem(self, config: Any) -> str | None:
        theirs = getattr(config, "num_channels", None)
        if isinstance(theirs, int) and theirs != self.channels:
            return f"takes {theirs} channels, task.channels is {self.channels}: set task.channels={theirs}"
        return None

    def sample_inputs(self, device: str) -> dict[str, torch.Tensor]:
        import torch

        if self.size_pixels == "auto":
            return {}
        shape = (1, self.channels, *self.scaling.geometry.size)
        return {"pixel_values": torch.zeros(shape, device=device)}

    def forward_problem(self, model: Any) -> str | None:
        import torch

        inputs = self.sample_inputs("meta")
        if not inputs:
            return None
        height, width = self.scaling.geometry.size
        try:
            with torch.no_grad():
                model(**inputs)
        except NotImplementedError:
            return None  # an operation without shapes alone
        except (ValueError, RuntimeError, AssertionError, IndexError, TypeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            if "meta" in first:
                return None
            own = getattr(model.config, "image_size", None)
            wanted = (
                f"task.size_pixels={own}" if own else "task.size_pixels to the model's own size"
            )
            return f"cannot read images of {height} × {width} pixels ({first}): set {wanted}"
        return None

    def exported_files(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """`transformers` reads from it how images are scaled."""
        scaling = self.scaling
        geometry, bgr = scaling.geometry, scaling.bgr
        (height, width), resize = geometry.size, geometry.resize
        crop = {"height": height, "width": width}
        scaled = resize if isinstance(resize, tuple) else (height, width)
        size = {"height": scaled[0], "width": scaled[1]}
        if isinstance(resize, int):
            size = {"shortest_edge": resize}
        mean, std = (tuple(v) * (self.channels // len(v)) for v in (scaling.mean, scaling.std))
        return {
            "preprocessor_config.json": {
                # The only one with another order of channels; it does not subtract or divide.
                "image_processor_type": "MobileViTImageProcessor" if bgr else "ViTImageProcessor",
                **({"do_flip_channel_order": True} if bgr else {}),
                "do_convert_rgb": self.channels == 3 or None,
                "do_resize": True,
                "size": size,
                "resample": RESAMPLING.index(geometry.resampling),
                "do_center_crop": resize is not None,
                "crop_size": crop,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": not bgr,
                "image_mean": list(mean),
                "image_std": list(std),
            }
        }


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _logits(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Outputs (rows, labels) in fp32."""
    dtype = next(model.parameters()).dtype
    logits: torch.Tensor = model(pixel_values=pixel_values.to(dtype)).logits
    return logits.float()
