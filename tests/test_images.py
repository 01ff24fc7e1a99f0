"""Images as files hold them, and the scaling of pretrained models' own processors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers
from one_process import encoded, exported, measured, model_of, planned
from PIL import Image

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.causal import settled
from orchestrator.tasks import BadRow, ImageClassification
from orchestrator.tasks.image_processor import own_scaling

SIDE = 8
TASK = ImageClassification(type="image_classification", size_pixels=SIDE)
GREY = ImageClassification(type="image_classification", size_pixels=SIDE, channels=1)
LABELS = ("dark", "light")


def stored(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def pixels(value: Any, task: ImageClassification = TASK) -> np.ndarray:
    """(height, width, channels) of an encoded row."""
    (row,) = task.encode([{"image": value, "label": "dark"}], None, 0, LABELS)
    assert not isinstance(row, BadRow), row
    return np.asarray(row["pixels"]).reshape(-1, SIDE, SIDE).transpose(1, 2, 0)


def why_bad(value: Any) -> str:
    (row,) = TASK.encode([{"image": value, "label": "dark"}], None, 0, LABELS)
    assert isinstance(row, BadRow)
    return row.why


def halves(left: Any, right: Any, mode: str) -> Image.Image:
    image = Image.new(mode, (SIDE, SIDE), left)
    image.paste(right, (SIDE // 2, 0, SIDE, SIDE))
    return image


def test_the_orientation_in_exif_is_applied() -> None:
    image = halves("red", "blue", "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    turned = pixels(stored(image, exif=exif))
    assert turned[0, 3].tolist() == turned[0, 5].tolist() == [255, 0, 0]
    assert turned[7, 3].tolist() == [0, 0, 255]
    assert pixels(stored(image))[7, 0].tolist() == [255, 0, 0]


def palette() -> Image.Image:
    image = halves(0, 1, "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "left", "right"),
    [
        (halves((10, 20, 30, 255), (90, 0, 0, 0), "RGBA"), [10, 20, 30], [255] * 3),
        (halves((10, 255), (0, 0), "LA"), [10] * 3, [255] * 3),
        (palette(), [10, 20, 30], [255] * 3),
        (halves((0, 0, 0, 255), (0, 0, 0, 51), "RGBA"), [0] * 3, [204] * 3),
        (halves(0, 1, "1"), [0] * 3, [255] * 3),
    ],
)  # fmt: skip
def test_transparent_pixels_are_laid_on_white(
    image: Image.Image, left: list[int], right: list[int]
) -> None:
    found = pixels(stored(image))
    assert (found[3, 0].tolist(), found[3, 7].tolist()) == (left, right)


def test_a_transparent_color_of_an_image_without_alpha_is_laid_on_white() -> None:
    found = pixels(stored(halves((10, 20, 30), (90, 0, 0), "RGB"), transparency=(90, 0, 0)))
    assert (found[3, 0].tolist(), found[3, 7].tolist()) == ([10, 20, 30], [255] * 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([[0, 257 * 100], [65535, 257 * 7]]), [0, 100, 255, 7]),
        (np.int32([[0, 257 * 100], [65535, 257 * 7]]), [0, 100, 255, 7]),
        (np.float32([[0, 0.2], [1, 0.4]]), [0, 51, 255, 102]),
        (np.float32([[0, 51], [255, 102]]), [0, 51, 255, 102]),
    ],
)
def test_wide_values_are_scaled_to_eight_bits_and_not_cut(
    values: np.ndarray, expected: list[int]
) -> None:
    image = Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    for task in (TASK, GREY):
        found = pixels(stored(image, "TIFF"), task)
        assert [int(found[y, x, 0]) for y in (0, 7) for x in (0, 7)] == expected


def test_other_color_spaces_and_animations_are_read() -> None:
    cmyk = pixels(stored(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "TIFF"))
    assert cmyk[0, 0].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "blue")]
    animated = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(animated)[0, 0].tolist() == [255, 0, 0]


def noisy(kind: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return stored(Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_a_bad_row(kind: str, share: float) -> None:
    whole = noisy(kind)
    assert "cannot be read as an image" in why_bad(whole[: int(len(whole) * share)])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ("https://example.org/a.png", "is a URL"),
        ("s3://bucket/a.png", "is a URL"),
        ([[1, 2], [3, 4]], "pixels as numbers"),
        (np.zeros((2, 2)), "pixels as numbers"),
        (None, "got null"),
        ("", "got nothing"),
        ("nowhere.png", "no file 'nowhere.png'"),
        ("a\0b.png", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be read"),
    ],
)
def test_what_is_no_image_names_the_reason(value: Any, why: str) -> None:
    assert why in why_bad(value)


def test_an_enormous_image_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in why_bad(stored(Image.new("L", (30, 30))))


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(stored(Image.new("RGB", (SIDE, SIDE), "red")))
    assert pixels("~/a.png")[0, 0].tolist() == [255, 0, 0]


PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "a size of old": {
        "feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 3,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
    },
    "scaled, then cut": {
        "image_processor_type": "DeiTImageProcessor", "size": {"height": 36, "width": 36},
        "crop_size": {"height": 32, "width": 32},
    },
    "shortest edge": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
    },
    "crop_pct": {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875,
    },
    "levit": {
        "image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
    "blue first": {
        "image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
    },
    "offset and second division": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32},
        "rescale_offset": True, "resample": 0,
    },
    "no normalization": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
        "do_normalize": False,
    },
    "values to 255": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
        "do_rescale": False, "do_normalize": False,
    },
    "rectangular": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 48}},
    "cut larger than the image": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 20},
        "crop_size": {"height": 32, "width": 32},
    },
}  # fmt: skip


def written(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_pixels_are_those_of_the_models_own_processor_and_of_the_export(
    tmp_path: Path, kind: str
) -> None:
    source = written(tmp_path / "model", PROCESSORS[kind])
    task = ImageClassification(type="image_classification").filled(str(source), None, {})
    assert not task.open_fields
    (fields,) = task.exported_files(LABELS).values()
    target = written(tmp_path / "export", fields)
    theirs, after = (
        transformers.AutoImageProcessor.from_pretrained(folder) for folder in (source, target)
    )
    atol = 0.03 if kind == "values to 255" else 1e-4
    for seed, shape in enumerate(((70, 45), (33, 90), (31, 31))):
        values = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
        image = Image.fromarray(values)
        (row,) = task.encode([{"image": stored(image), "label": "dark"}], None, 0, LABELS)
        assert not isinstance(row, BadRow)
        ours = task.collate([{k: np.asarray(v) for k, v in row.items()}], np.ones(1), 0)
        expected = theirs(images=image, return_tensors="np")["pixel_values"]
        assert np.allclose(ours["pixel_values"].numpy(), expected, atol=atol)
        again = after(images=image, return_tensors="np")["pixel_values"]
        assert np.allclose(again, expected, atol=atol)


def test_what_the_job_sets_wins_and_cutting_keeps_its_proportion(tmp_path: Path) -> None:
    source = written(tmp_path, PROCESSORS["shortest edge"])
    given = ImageClassification(
        type="image_classification", size_pixels=64, mean=(0.5,), resampling="nearest"
    )
    task = given.filled(str(source), None, {})
    assert (task.size_pixels, task.resize_pixels, task.resampling) == (64, 80, "nearest")
    assert task.mean == (0.5,)
    assert task.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert task.model_fields_set == given.model_fields_set
    whole = ImageClassification(type="image_classification", resize_pixels=None)
    assert whole.filled(str(source), None, {}).resize_pixels is None


def test_without_a_processor_the_config_names_the_size() -> None:
    task = ImageClassification(type="image_classification").filled(None, None, {"image_size": 96})
    assert (task.size_pixels, task.resize_pixels, task.mean) == (96, None, (0.5,) * 3)


def test_timm_models_name_their_scaling_in_the_config() -> None:
    fields = {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    own = own_scaling("nowhere", None, {"pretrained_cfg": fields})
    assert own is not None
    assert (own.geometry.size, own.geometry.resize) == ((224, 224), 256)
    assert (own.geometry.resampling, own.mean, own.std) == (
        "bicubic",
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )


def test_a_processor_that_cannot_be_followed_is_refused_with_the_fields(tmp_path: Path) -> None:
    for fields in ({"image_processor_type": "NoSuchImageProcessor"},
                   {"image_processor_type": "PerceiverImageProcessor"}):  # fmt: skip
        source = written(tmp_path, fields)
        with pytest.raises(OrchestratorError, match=r"task\.size_pixels"):
            ImageClassification(type="image_classification").filled(str(source), None, {})


def job(tmp_path: Path, processor: dict[str, Any] | None, **task: Any) -> Any:
    """A ViT of 32 pixels with a processor, and rows of images in other sizes."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.ViTConfig(image_size=32, patch_size=8, **shape)
    model = tmp_path / "model"
    transformers.ViTForImageClassification(config).save_pretrained(model)
    if processor:
        written(model, processor)
    rows = []
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 256, (50, 41, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        Image.fromarray(values).save(path)
        rows.append({"image": str(path), "label": LABELS[i % 2]})
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    return tiny.job(
        model, data, tmp_path, task={"type": "image_classification", **task},
        data={"prepared_dir": str(tmp_path / "prepared")},
    )  # fmt: skip


def test_the_plan_says_where_the_scaling_comes_from(tmp_path: Path) -> None:
    plan = planned(job(tmp_path, PROCESSORS["shortest edge"], std=[0.5]))
    found = {knob.field: knob for knob in plan.defaults}
    assert "BitImageProcessor" in found["task.mean"].why
    assert found["task.resize_pixels"].value == "40"
    assert "task.std" not in found
    assert any(knob.field == "task.std" for knob in plan.settings)


def test_rows_are_prepared_anew_where_another_processor_changes_them(tmp_path: Path) -> None:
    first = planned(job(tmp_path, PROCESSORS["vit"]))
    scaled = dict(PROCESSORS["vit"], image_mean=[0.1] * 3)
    assert planned(job(tmp_path, scaled)).train_data.folder == first.train_data.folder
    cut = planned(job(tmp_path, PROCESSORS["shortest edge"]))
    assert cut.train_data.folder != first.train_data.folder


def test_the_export_predicts_alike_in_a_plain_pipeline(tmp_path: Path) -> None:
    spec = job(tmp_path, PROCESSORS["shortest edge"])
    plan = planned(spec)
    model = model_of(plan)
    folder = exported(plan, model, tmp_path / "export")
    files = [str(tmp_path / f"{i}.png") for i in range(6)]
    run = transformers.pipeline("image-classification", model=str(folder), batch_size=4)
    plain = [one[0] for one in run(files)]
    ours = plan.spec.task.predict(model, None, [{"image": file} for file in files], 0)
    assert [one["label"] for one in ours] == [one["label"] for one in plain]
    assert [one["score"] for one in ours] == pytest.approx([p["score"] for p in plain], abs=1e-4)
    figures = measured(plan, model, encoded(plan.spec))
    assert [plan.labels[i] for i in figures["predicted"]] == [one["label"] for one in ours]


def test_a_size_that_the_model_cannot_read_is_refused_before_training(tmp_path: Path) -> None:
    spec = job(tmp_path, PROCESSORS["vit"], size_pixels=48)
    with pytest.raises(OrchestratorError, match=r"task\.size_pixels=32"):
        build_model(settled(spec), LABELS, on_meta=True)
