"""Speech: audio read and normed, characters by CTC, errors counted over the corpus."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import torch
from transformers import AutoModelForCTC, Wav2Vec2Config

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.plan.memory import MemorySetup, activation_bytes
from orchestrator.plan.model_stats import stats_of
from orchestrator.tasks import BadRow, SpeechRecognition
from orchestrator.tasks.batches import ragged
from orchestrator.tasks.ctc import likeliest

LABELS = (" ", "a", "b", "c")
TASK = SpeechRecognition(
    type="speech_recognition", labels=LABELS, sampling_rate_hz=1000, frame_samples=20
)
SHAPE = tiny.WAVE_SHAPE


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = Wav2Vec2Config(**SHAPE, **TASK.config_overrides(LABELS))
    return AutoModelForCTC.from_config(config).eval()


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"audio": tiny.tones(text), "text": text} for text in texts]


def encoded(*texts: str) -> list[Any]:
    rows = TASK.encode(said(*texts), None, 0, LABELS)
    assert not any(isinstance(row, BadRow) for row in rows), rows
    return [
        {n: np.asarray(row[n]) if n != "reference" else row[n] for n in TASK.features()}
        for row in rows
        if not isinstance(row, BadRow)
    ]


def test_audio_is_mono_of_mean_zero_and_variance_one(tmp_path: Path) -> None:
    wave = np.stack([np.linspace(0, 1, 500), np.linspace(1, 3, 500)], 1)
    path = tmp_path / "a.flac"
    soundfile.write(path, wave / 4, 1000)
    (row,) = TASK.encode([{"audio": str(path), "text": "A  b"}], None, 0, LABELS)
    assert not isinstance(row, BadRow)
    assert (len(row["audio"]), TASK.length(row)) == (500, 25)
    assert float(row["audio"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(row["audio"].var()) == pytest.approx(1, abs=1e-2)
    assert (row["characters"], row["reference"]) == ([2, 1, 3], "a b")


def wav(samples: int, rate: int = 1000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(samples)), rate, format="WAV")
    return out.getvalue()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"audio": None}, "must be a path or bytes"),
        ({"audio": b"noise"}, "cannot be read as audio"),
        ({"audio": "nowhere.wav"}, "cannot be read as audio"),
        ({"audio": wav(500, 2000), "text": "a" * 8}, "250 samples are too short"),  # resampled
        ({"audio": wav(0)}, "lasts 0.0 s"),
        ({"audio": {"bytes": None, "path": None}}, "neither bytes nor a path"),
        ({"audio": "https://example.org/a.wav"}, "is a URL"),
        ({"audio": [0.1, 0.2]}, "samples without a rate"),
        ({"audio": {"array": [0.0, float("nan")] * 300, "sampling_rate": 1000}}, "NaN"),
        ({"audio": {"array": [[0.0] * 300] * 2, "sampling_rate": 1000}}, "2 dimensions"),
        ({"audio": wav(21_000)}, "lasts 21.0 s, task.max_audio_s is 20.0"),
        ({"text": "a z"}, "character 'z' is not among"),
        ({"text": "a" * 13}, "too short for 13 characters"),  # 25 frames, 13 + 12 blanks
        ({"text": ""}, "'text' is empty"),
    ],
)
def test_what_cannot_be_heard_is_a_bad_row(row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([{"audio": wav(500), "text": "ab"} | row], None, 0, LABELS)
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_the_loss_is_that_of_each_row_alone_and_of_transformers(model: Any) -> None:
    rows = encoded("ab", "c a b", "bb")
    with torch.no_grad():
        alone = [float(TASK.loss_sum(model, TASK.collate([r], np.ones(1), 0))) for r in rows]
        batch = TASK.collate(rows, np.ones(3), 0)
        assert float(TASK.loss_sum(model, batch)) == pytest.approx(sum(alone), rel=1e-4)
        two = TASK.collate(rows, np.array([1, 0, 1]), 0)
        assert float(TASK.loss_sum(model, two)) == pytest.approx(alone[0] + alone[2], rel=1e-4)
        model.config.ctc_loss_reduction = "sum"
        inputs = {n: batch[n] for n in ("input_values", "attention_mask")}
        theirs = model(**inputs, labels=batch["labels"].masked_fill(batch["labels"] == 0, -100))
    assert float(theirs.loss) == pytest.approx(sum(alone), rel=1e-4)


def test_repeats_are_one_character_unless_a_blank_is_between(model: Any) -> None:
    frames = [[0, 2, 2, 0, 2, 3, 3, 1], [4, 4, 0, 0, 0, 0, 3, 3]]
    scores = torch.nn.functional.one_hot(torch.tensor(frames), 5).float()
    assert likeliest(scores, torch.tensor([8, 6]), 0) == [[2, 2, 3, 1], [4]]


def test_errors_are_counted_over_the_corpus() -> None:
    gathered = {
        "loss": np.array([3.0, 5.0]),
        "n_targets": np.array([1, 7]),
        "heard": ragged([[2], [2, 1, 3]]),
        "reference": ragged(["b", "a b c c"]),
    }
    got = TASK.metrics(gathered, LABELS)
    # words: 1 of 1 wrong, 2 of 4 missing; characters: 1 of 1 wrong, 4 of 7 missing
    assert got["wer"] == pytest.approx(3 / 5)
    assert got["cer"] == pytest.approx(5 / 8)
    assert got["loss"] == 1.0
    assert set(TASK.metric_names) <= set(got)


def test_a_prediction_says_what_an_evaluation_heard(model: Any, tmp_path: Path) -> None:
    rows = said("ab", "c a b")
    with torch.no_grad():
        measured = TASK.measure(model, TASK.collate(encoded("ab", "c a b"), np.ones(2), 0))
    predicted = TASK.predict(model, None, rows, 0)
    wanted = [" ".join("".join(LABELS[i - 1] for i in ids).split()) for ids in measured["heard"]]
    assert [p["text"] for p in predicted] == wanted
    assert TASK.predict(model, None, [{"audio": "nowhere.wav"}], 0)[0]["text"] is None


def test_a_wrong_number_of_samples_per_output_is_refused(tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"audio": "a.wav", "text": "a"}])
    task = {"type": "speech_recognition", "frame_samples": 20}
    config = {"model_type": "wav2vec2", **SHAPE, "conv_stride": [5, 2]}
    spec = tiny.job(
        tmp_path, rows, tmp_path, task=task, model={"pretrained": None, "config": config}
    )
    with pytest.raises(OrchestratorError, match="one output per 10 samples"):
        build_model(spec, LABELS)


def test_memory_of_speech_models_is_about_what_autograd_keeps() -> None:
    config = Wav2Vec2Config(
        **{**SHAPE, "hidden_size": 64, "intermediate_size": 256, "conv_dim": [64, 64]}
    )
    model: Any = AutoModelForCTC.from_config(config)
    samples, kept, alive = 4000, {}, []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model.train()(input_values=torch.randn(2, samples))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    facts = stats_of(model)
    setup = MemorySetup(
        world_size=1, stage=0, bf16=False, optimizer_states=2, offload_optimizer=False,
        offload_param=False, bucket_elements=1, gradient_checkpointing=False, on_gpu=False,
        all_logits=False,
    )  # fmt: skip
    estimate = activation_bytes(facts, setup, 2, samples // 20)
    assert measured == pytest.approx(estimate, rel=0.35)
