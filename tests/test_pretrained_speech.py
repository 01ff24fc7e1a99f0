"""Pretrained speech models: group norm, vocabularies with a head, rates and formats of recordings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import torch
import transformers
from one_process import encoded, exported, measured, model_of, planned

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.tasks import BadRow, SpeechRecognition
from orchestrator.train.export import load_exported

RATE = 1000
TASK = SpeechRecognition(type="speech_recognition", sampling_rate_hz=RATE, frame_samples=20)
UPPER = ["<s>", "<pad>", "</s>", "<unk>", "|", "C", "A", "B"]
"""Tokens of a pretrained head by output; its blank is 1."""
SAID = ("ab", "c a b", "bb", "cab cab", "a")


def recording(text: str, rate: int = RATE, **how: Any) -> bytes:
    samples, _ = soundfile.read(io.BytesIO(tiny.tones(text)))
    out = io.BytesIO()
    soundfile.write(out, np.repeat(samples, rate // RATE), rate, **{"format": "WAV", **how})
    return out.getvalue()


def checkpoint(
    folder: Path,
    kind: str = "wav2vec2",
    head: bool = True,
    tokens: list[str] = UPPER,
    **config: Any,
) -> Path:
    """A tiny model with a feature extractor of its own and, as `head`, a vocabulary."""
    torch.manual_seed(0)
    fields = {
        **tiny.WAVE_SHAPE,
        "feat_extract_norm": "group",
        "apply_spec_augment": False,
        **config,
    }
    built = transformers.AutoConfig.for_model(
        kind, **fields, vocab_size=len(tokens), pad_token_id=tokens.index("<pad>")
    )
    auto = transformers.AutoModelForCTC if head else transformers.AutoModel
    auto.from_config(built).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True)
    extractor.save_pretrained(folder)
    return folder


def job(model: Path, folder: Path, **task: Any) -> Any:
    folder.mkdir(exist_ok=True)
    rows = []
    for i, text in enumerate(SAID):
        path = folder / f"{i}.wav"
        path.write_bytes(recording(text))
        rows.append({"audio": str(path), "text": text})
    data = tiny.write_jsonl(folder / "rows.jsonl", rows)
    return tiny.job(
        model, data, folder, task={"type": "speech_recognition", **task},
        data={"prepared_dir": str(folder / "prepared")},
    )  # fmt: skip


KINDS = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_heard_in_a_batch_as_transformers_hears_it_alone(
    tmp_path: Path, kind: str
) -> None:
    source = checkpoint(tmp_path / "model", kind)
    plan = planned(job(source, tmp_path / "job"))
    rows, model = encoded(plan.spec), model_of(plan)
    assert len({len(row["audio"]) for row in rows}) > 1
    together = measured(plan, model, rows)
    plain: Any = transformers.AutoModelForCTC.from_pretrained(source).eval()
    for i, row in enumerate(rows):
        alone = measured(plan, model, [row])
        assert together["loss"][i] == pytest.approx(alone["loss"][0], rel=1e-3)
        inputs = torch.tensor(np.asarray(row["audio"], np.float32))[None]
        labels = torch.tensor(np.asarray(row["characters"], np.int64))[None]
        plain.config.ctc_loss_reduction = "sum"
        with torch.no_grad():
            theirs = float(plain(input_values=inputs, labels=labels).loss)
        assert together["loss"][i] == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("kind", ["data2vec-audio", "wav2vec2-conformer"])
def test_a_model_that_padding_reaches_takes_one_row_at_a_time(tmp_path: Path, kind: str) -> None:
    spec = job(checkpoint(tmp_path / "model", kind), tmp_path / "job")
    with pytest.raises(OrchestratorError, match=r"batch\.micro_batch_size=1"):
        planned(spec)
    batch = spec.batch.model_copy(update={"micro_batch_size": 1})
    assert planned(spec.model_copy(update={"batch": batch})).micro_batch_size == 1


def test_group_norm_learns_from_a_padded_row_what_it_learns_from_it_alone(tmp_path: Path) -> None:
    plan = planned(job(checkpoint(tmp_path / "model", num_hidden_layers=1), tmp_path / "job"))
    rows, task = encoded(plan.spec), plan.spec.task

    def gradients(weights: list[float], chosen: list[Any]) -> list[torch.Tensor]:
        model: Any = model_of(plan)
        task.loss_sum(model, plan.collate(chosen, np.float32(weights))).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    short = min(range(len(rows)), key=lambda i: len(rows[i]["audio"]))
    others = [row for i, row in enumerate(rows) if i != short]
    alone = gradients([1], [rows[short]])
    beside = gradients([1, 0, 0, 0, 0], [rows[short], *others])
    for one, two in zip(alone, beside, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max()) + 1e-6)


def test_the_export_of_a_group_norm_model_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    plan = planned(job(checkpoint(tmp_path / "model"), tmp_path / "job"))
    model = model_of(plan)
    _, loaded, _ = load_exported(exported(plan, model, tmp_path / "export"))
    rows = encoded(plan.spec)
    before, after = (measured(plan, one, rows)["loss"] for one in (model, loaded))
    assert after == pytest.approx(before, rel=1e-4)


def test_a_pretrained_head_keeps_its_vocabulary_and_its_blank(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    plan = planned(job(source, tmp_path / "job"))
    task: Any = plan.spec.task
    assert (task.vocabulary, task.blank) == (tuple(" " if t == "|" else t for t in UPPER), 1)
    assert (task.sampling_rate_hz, task.frame_samples) == (RATE, 20)
    (row, *_) = encoded(plan.spec)
    assert list(row["characters"]) == [UPPER.index("A"), UPPER.index("B")]
    assert row["reference"] == "AB"
    model = model_of(plan)
    before = transformers.AutoModelForCTC.from_pretrained(source).lm_head.weight
    assert torch.equal(model.lm_head.weight, before)
    assert model.config.pad_token_id == 1


def test_a_head_for_other_characters_is_drawn_anew_even_at_the_same_size(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", tokens=["<pad>", "|", "x", "y", "z"])
    spec = job(source, tmp_path / "job", vocabulary=None)
    plan = planned(spec)
    assert plan.labels == (" ", "a", "b", "c")
    before = transformers.AutoModelForCTC.from_pretrained(source).lm_head.weight
    after: Any = build_model(plan.spec, plan.labels)
    assert after.lm_head.weight.shape == before.shape
    assert not torch.equal(after.lm_head.weight, before)
    kept = planned(job(source, tmp_path / "other", labels=["a", "b", "c", " "]))
    assert kept.spec.task.outputs(kept.labels) == ("<pad>", "a", "b", "c", " ")


def test_characters_outside_a_kept_vocabulary_name_the_field(tmp_path: Path) -> None:
    task = TASK.filled(str(checkpoint(tmp_path)), None, {"architectures": ["Wav2Vec2ForCTC"],
                       "vocab_size": len(UPPER), "pad_token_id": 1, "conv_stride": [5, 4]})  # fmt: skip
    (bad,) = task.encode([{"audio": recording("a"), "text": "a!"}], None, 0, task.labels or ())
    assert isinstance(bad, BadRow)
    assert "task.vocabulary=null" in bad.why


def test_a_body_without_a_head_learns_the_characters_of_the_rows(tmp_path: Path) -> None:
    plan = planned(job(checkpoint(tmp_path / "model", head=False), tmp_path / "job"))
    assert plan.labels == (" ", "a", "b", "c")
    assert plan.spec.task.outputs(plan.labels)[0] == "<pad>"


def test_a_feature_extractor_that_does_not_normalize_is_followed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    extractor.save_pretrained(source)
    plan = planned(job(source, tmp_path / "job"))
    samples, _ = soundfile.read(io.BytesIO(recording(SAID[0])), dtype="float32")
    assert np.allclose(encoded(plan.spec)[0]["audio"], samples, atol=1e-6)
    folder = exported(plan, model_of(plan), tmp_path / "export")
    assert not transformers.AutoFeatureExtractor.from_pretrained(folder).do_normalize


@pytest.mark.parametrize("vocabulary", ["auto", None])
def test_the_export_says_the_same_in_a_plain_pipeline(tmp_path: Path, vocabulary: Any) -> None:
    source = checkpoint(tmp_path / "model", feat_extract_norm="layer")
    plan = planned(job(source, tmp_path / "job", vocabulary=vocabulary))
    model = model_of(plan)
    with torch.no_grad():  # outputs that change from frame to frame
        model.lm_head.weight.mul_(200)
    folder = exported(plan, model, tmp_path / "export")
    files = [str(tmp_path / "job" / f"{i}.wav") for i in range(len(SAID))]
    ours = plan.spec.task.predict(model, None, [{"audio": file} for file in files], 0)
    run = transformers.pipeline("automatic-speech-recognition", model=str(folder))
    sounds = [{"raw": soundfile.read(f, dtype="float32")[0], "sampling_rate": RATE} for f in files]
    plain = [" ".join(run(dict(sound))["text"].split()) for sound in sounds]
    assert [one["text"] for one in ours] == plain
    assert any(plain)


@pytest.mark.parametrize(
    "how",
    [
        {"subtype": "PCM_16"}, {"subtype": "PCM_24"}, {"subtype": "PCM_U8"}, {"subtype": "FLOAT"},
        {"format": "FLAC"}, {"format": "OGG"},
    ],
)  # fmt: skip
def test_formats_give_the_same_sound(how: dict[str, str]) -> None:
    rate = 8000 if how.get("format") == "OGG" else RATE
    expected, found = (
        TASK._samples(recording("abc", rate, **one)) for one in ({"subtype": "DOUBLE"}, how)
    )
    assert not isinstance(expected, BadRow)
    assert not isinstance(found, BadRow)
    assert float(np.corrcoef(expected, found[: len(expected)])[0, 1]) > 0.98


@pytest.mark.parametrize("rate", [500, 2000, 4410])
def test_other_rates_are_resampled(rate: int) -> None:
    def tone(per_second: int) -> dict[str, Any]:
        at = np.arange(per_second) / per_second
        return {"array": np.sin(2 * np.pi * 60 * at).tolist(), "sampling_rate": per_second}

    expected, found = TASK._samples(tone(RATE)), TASK._samples(tone(rate))
    assert not isinstance(expected, BadRow)
    assert not isinstance(found, BadRow)
    assert len(found) == len(expected) == RATE
    assert float(np.abs(found - expected)[50:-50].max()) < 0.05


def test_channels_are_averaged() -> None:
    out = io.BytesIO()
    wave = np.sin(np.arange(RATE) / 9)
    soundfile.write(out, np.stack([wave, np.zeros_like(wave)], 1), RATE, format="WAV")
    found = TASK._samples(out.getvalue())
    assert not isinstance(found, BadRow)
    assert np.allclose(found, (wave - wave.mean()) / wave.std(), atol=1e-2)
