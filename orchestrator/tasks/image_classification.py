"""Single-label image classification."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.errors import Problem
from orchestrator.tasks.base import (
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Scores,
    SoftTargets,
)
from orchestrator.tasks.single_label import SingleLabel
from orchestrator.tasks.usual import BY_SIZE, IMAGE_NEW, IMAGE_TUNED, Rate

if TYPE_CHECKING:
    import numpy as np
    import torch


class ImageClassification(SingleLabel):
    """One label per image. Images are scaled once, when rows are prepared."""

    type: Literal["image_classification"]
    image_column: str = "image"
    """Column with the image: a file's path, its bytes, or `{bytes, path}` as `datasets` writes them."""
    size_pixels: Annotated[int, Field(ge=1)] = 224
    """Height and width that images are scaled to; the model's own."""
    channels: Literal[1, 3] = 3
    """3: red, green and blue; 1: grey."""
    mean: tuple[float, ...] = (0.5,)
    """Taken off values of 0 to 1, per channel or one for all. A pretrained model's own is `image_mean` in
    its preprocessor_config.json."""
    std: tuple[float, ...] = (0.5,)
    """What remains is divided by it; a pretrained model's own is `image_std`."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline_tag: ClassVar[str] = "image-classification"
    peft_task: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    soft_targets: ClassVar[SoftTargets | None] = "classes"
    fixed_length: ClassVar[bool] = True
    after_prepare: ClassVar[frozenset[str]] = frozenset({"mean", "std"})
    usual_global_rows_source: ClassVar[str] = (
        "a start and no more: transformers' guide to image classification takes 64"
    )
    tuned_rates: ClassVar[Mapping[str, Rate]] = IMAGE_TUNED
    new_rates: ClassVar[BY_SIZE] = IMAGE_NEW
    sources: ClassVar[Mapping[str, str]] = {
        "size_pixels": "the size that ViT was pre-trained on: Dosovitskiy et al., arXiv 2010.11929",
        "mean": "ViT's own: 0 to 1 becomes -1 to 1",
        "std": "ViT's own: 0 to 1 becomes -1 to 1",
    }

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from super().broken_rules(has_eval)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels):
                yield Problem(
                    f"task.{name}", f"needs 1 or {self.channels} values", "one per channel", values
                )
        if any(value <= 0 for value in self.std):
            yield Problem("task.std", "must be above 0", "", self.std)

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
        """Values 0 to 255 (channels × size × size,), or why there are none."""
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes) or not value:
            return BadRow(
                f"column {self.image_column!r} must be a path or bytes, got {type(value).__name__}"
            )
        try:
            with Image.open(value if isinstance(value, str) else io.BytesIO(value)) as file:
                image = file.convert("L" if self.channels == 1 else "RGB")
            side = self.size_pixels
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            array = np.asarray(image, dtype=np.uint8).reshape(side, side, self.channels)
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            return BadRow(f"column {self.image_column!r} cannot be read as an image: {error}")
        return array.transpose(2, 0, 1).ravel()

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
        """(rows, channels, size, size) in fp32, scaled as the model expects."""
        import numpy as np
        import torch

        shape = (len(pixels), self.channels, self.size_pixels, self.size_pixels)
        values = torch.from_numpy(np.stack(pixels).reshape(shape)).float() / 255
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
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
        sides = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        for name, theirs, ours in zip(
            ("size_pixels", "channels"), sides, (self.size_pixels, self.channels), strict=True
        ):
            if isinstance(theirs, int) and theirs != ours:
                return f"takes {theirs}, task.{name} is {ours}: set task.{name}={theirs}"
        return None

    def exported_files(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """`transformers` reads from it how images are scaled."""
        return {
            "preprocessor_config.json": {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": self.size_pixels, "width": self.size_pixels},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(self.mean) * (self.channels // len(self.mean)),
                "image_std": list(self.std) * (self.channels // len(self.std)),
            }
        }


def _logits(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Outputs (rows, labels) in fp32."""
    dtype = next(model.parameters()).dtype
    logits: torch.Tensor = model(pixel_values=pixel_values.to(dtype)).logits
    return logits.float()
