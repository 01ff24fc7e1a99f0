"""Speech recognition: characters from a waveform, without an alignment, by CTC."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.tasks.base import (
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Task,
    ragged,
    text_problem,
)
from orchestrator.tasks.usual import BY_SIZE, SPEECH_NEW, SPEECH_TUNED, Rate

if TYPE_CHECKING:
    import numpy as np
    import torch

BLANK = 0
"""The output that stands for no character; character i of the label set is output i + 1."""


class SpeechRecognition(Task):
    """Audio becomes text, character by character (CTC: Graves et al., ICML 2006).

    For models that read waveforms, as wav2vec2 and hubert do; with `feat_extract_norm: layer`, so that
    what pads a batch changes nothing.
    """

    type: Literal["speech_recognition"]
    audio_column: str = "audio"
    """Column with the audio: a file's path (WAV, FLAC, OGG), its bytes, or `{bytes, path}`."""
    text_column: str = "text"
    """Column with what is said."""
    lower_case: bool = True
    """Learn and compare in lower case."""
    sampling_rate_hz: Annotated[int, Field(ge=1)] = 16_000
    """Samples per second; audio of another rate is a bad row."""
    max_audio_s: Annotated[float, Field(gt=0)] = 20.0
    """Longer audio is a bad row: it cannot be cut without its text."""
    frame_samples: Annotated[int, Field(ge=1)] = 320
    """Samples per output of the model: the product of its config's `conv_stride`."""
    labels: tuple[str, ...] | None = None
    """The characters. Default: those of the training rows, sorted."""

    metric_names: ClassVar[tuple[str, ...]] = ("wer", "cer", "loss")
    default_metric: ClassVar[str] = "wer"
    auto_class: ClassVar[str] = "AutoModelForCTC"
    pipeline_tag: ClassVar[str] = "automatic-speech-recognition"
    peft_task: ClassVar[str] = ""
    no_soft_targets: ClassVar[str] = "CTC does not know which frame says which character"
    reads_text: ClassVar[bool] = False
    required_inputs: ClassVar[tuple[str, ...]] = ("input_values",)
    kept_features: ClassVar[tuple[str, ...]] = ("reference",)
    usual_global_rows: ClassVar[int] = 16
    usual_global_rows_source: ClassVar[str] = (
        "a start and no more: recipes count seconds of audio instead of rows"
    )
    tuned_rates: ClassVar[Mapping[str, Rate]] = SPEECH_TUNED
    new_rates: ClassVar[BY_SIZE] = SPEECH_NEW
    sources: ClassVar[Mapping[str, str]] = {
        "sampling_rate_hz": "what wav2vec 2.0, HuBERT and WavLM were pre-trained on",
        "max_audio_s": "a limit to the memory of a batch and no more",
        "frame_samples": "wav2vec 2.0's strides: Baevski et al., arXiv 2006.11477, 4.2, one output per 20 ms",
    }

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.audio_column, self.text_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.audio_column,)

    @property
    def label_source(self) -> str | None:
        return self.text_column if self.labels is None else None

    def labels_in(self, value: Any) -> Iterable[str]:
        return self._said(value) if isinstance(value, str) else ()

    def _said(self, text: str) -> str:
        words = " ".join(text.split())
        return words.lower() if self.lower_case else words

    def features(self) -> dict[str, FeatureKind]:
        return {"audio": "floats", "characters": "ints", "reference": "text"}

    def length(self, row: EncodedRow) -> int:
        return max(1, len(row["audio"]) // self.frame_samples)

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        index = {label: i + 1 for i, label in enumerate(labels)}
        return [self._encoded(row, index) for row in rows]

    def _encoded(self, row: RawRow, index: dict[str, int]) -> EncodedRow | BadRow:
        if why := text_problem(row.get(self.text_column), self.text_column):
            return BadRow(why)
        text = self._said(row[self.text_column])
        if unknown := sorted(set(text) - index.keys()):
            return BadRow(f"character {unknown[0]!r} is not among the {len(index)} that are known")
        audio = self._samples(row.get(self.audio_column))
        if isinstance(audio, BadRow):
            return audio
        ids = [index[character] for character in text]
        # Between two equal characters CTC needs a blank.
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        if len(audio) // self.frame_samples <= needed:
            return BadRow(f"{len(audio)} samples are too short for {len(ids)} characters")
        return {
            "audio": audio,
            "characters": ids,
            "reference": text,
            "n_targets": len(ids),
            "truncated": 0,
        }

    def _samples(self, value: Any) -> np.ndarray | BadRow:
        """Mono samples (n,) of mean 0 and variance 1, or why there are none."""
        import numpy as np
        import soundfile

        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes) or not value:
            kind = type(value).__name__
            return BadRow(f"column {self.audio_column!r} must be a path or bytes, got {kind}")
        try:
            source = value if isinstance(value, str) else io.BytesIO(value)
            samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            return BadRow(f"column {self.audio_column!r} cannot be read as audio: {error}")
        if rate != self.sampling_rate_hz:
            return BadRow(
                f"has {rate} samples per second, not {self.sampling_rate_hz}: resample it"
            )
        mono = samples.mean(-1)
        if not 0 < len(mono) <= self.max_audio_s * rate:
            return BadRow(f"lasts {len(mono) / rate:.1f} s, task.max_audio_s is {self.max_audio_s}")
        normal: np.ndarray = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7)
        return normal.astype(np.float32)

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        names = {BLANK: "<pad>"} | {i + 1: label for i, label in enumerate(labels)}
        return {
            "vocab_size": len(names),
            "pad_token_id": BLANK,  # the blank of `transformers`' CTC models
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
        }

    def input_problem(self, config: Any) -> str | None:
        strides = list(getattr(config, "conv_stride", None) or ())
        samples = math.prod(strides)
        if strides and samples != self.frame_samples:
            return f"gives one output per {samples} samples: set task.frame_samples={samples}"
        if getattr(config, "feat_extract_norm", "layer") != "layer":
            return "norms over time, so padding would change results: set feat_extract_norm: layer"
        return None

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        characters = [torch.from_numpy(np.array(row["characters"], np.int64)) for row in rows]
        return {
            **_waves([row["audio"] for row in rows]),
            "labels": torch.nn.utils.rnn.pad_sequence(characters, batch_first=True),
            "label_lengths": torch.tensor([len(one) for one in characters]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores, frames = self._scores(model, batch)
        return (_losses(scores, frames, batch) * batch["weights"]).sum()

    def _scores(
        self, model: Any, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (rows, frames, outputs) in fp32, and how many frames are real (rows,)."""
        dtype = next(model.parameters()).dtype
        logits = model(
            input_values=batch["input_values"].to(dtype), attention_mask=batch["attention_mask"]
        ).logits
        frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
        return logits.float().log_softmax(-1), frames

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        scores, frames = self._scores(model, batch)
        losses = _losses(scores, frames, batch)
        return {
            "loss": losses.double().cpu().numpy(),
            "n_targets": batch["label_lengths"].cpu().numpy(),
            "heard": ragged(_heard(scores, frames)),
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Edits over all words, or characters, of the references."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        heard = [_text(ids, labels) for ids in gathered["heard"]]
        references = [str(reference) for reference in gathered["reference"]]
        return {
            "loss": float(gathered["loss"].sum()) / max(int(gathered["n_targets"].sum()), 1),
            "wer": float(word_error_rate(heard, references)),
            "cer": float(char_error_rate(heard, references)),
        }

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import torch

        names = model.config.id2label
        labels = [names[i] for i in range(BLANK + 1, len(names))]
        out = []
        for row in rows:
            value = row[self.audio_column]
            named = {"audio": value} if isinstance(value, str) else {}
            audio = self._samples(value)
            if isinstance(audio, BadRow):
                out.append({**named, "text": None, "why": audio.why})
                continue
            batch = {name: tensor.to(model.device) for name, tensor in _waves([audio]).items()}
            with torch.no_grad():
                (ids,) = _heard(*self._scores(model, batch))
            out.append({**named, "text": _text(ids, labels)})
        return out

    def exported_files(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """A feature extractor and a CTC tokenizer, as `transformers` reads them."""
        characters = {"|" if c == " " else c: i + 1 for i, c in enumerate(labels)}
        return {
            "preprocessor_config.json": {
                "feature_extractor_type": "Wav2Vec2FeatureExtractor",
                "feature_size": 1,
                "sampling_rate": self.sampling_rate_hz,
                "padding_value": 0.0,
                "do_normalize": True,
                "return_attention_mask": True,
            },
            "vocab.json": {"<pad>": BLANK, **characters},
            "tokenizer_config.json": {
                "tokenizer_class": "Wav2Vec2CTCTokenizer",
                "pad_token": "<pad>",
                "unk_token": None,
                "bos_token": None,
                "eos_token": None,
                "word_delimiter_token": "|",
            },
        }


def _waves(audio: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """`input_values` and `attention_mask`, both (rows, longest)."""
    import numpy as np
    import torch

    values = np.zeros((len(audio), max(len(one) for one in audio)), dtype=np.float32)
    mask = np.zeros(values.shape, dtype=np.int64)
    for i, one in enumerate(audio):
        values[i, : len(one)], mask[i, : len(one)] = one, 1
    return {"input_values": torch.from_numpy(values), "attention_mask": torch.from_numpy(mask)}


def _losses(
    scores: torch.Tensor, frames: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """CTC loss of each row (rows,), summed over its characters."""
    import torch.nn.functional as functional

    return functional.ctc_loss(
        scores.transpose(0, 1),
        batch["labels"],
        frames,
        batch["label_lengths"],
        blank=BLANK,
        reduction="none",
    )


def _heard(scores: torch.Tensor, frames: torch.Tensor) -> list[list[int]]:
    """The likeliest output per frame; repeats are one, blanks none."""
    import torch

    best = scores.argmax(-1).cpu()
    rows = [torch.unique_consecutive(row[:n]) for row, n in zip(best, frames.tolist(), strict=True)]
    return [row[row != BLANK].tolist() for row in rows]


def _text(ids: Sequence[int], labels: Sequence[str]) -> str:
    return " ".join("".join(labels[i - 1] for i in ids).split())
