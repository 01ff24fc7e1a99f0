"""Speech recognition: characters from a waveform, without an alignment, by CTC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.errors import Problem
from orchestrator.tasks.base import BadRow, EncodedRow, FeatureKind, RawRow, Task, text_problem
from orchestrator.tasks.batches import ragged
from orchestrator.tasks.ctc import (
    DELIMITER,
    likeliest,
    losses,
    own_settings,
    own_vocabulary,
    text_of,
)
from orchestrator.tasks.default_lr import BY_SIZE, SPEECH_NEW, SPEECH_TUNED, Rate
from orchestrator.tasks.sounds import open_sound

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    import torch

PADDING = "<pad>"
"""The blank's token where the vocabulary is the job's."""
SETTINGS = ("sampling_rate_hz", "normalize", "frame_samples", "vocabulary", "blank")
"""Fields that are the model's own unless the job names others."""


class SpeechRecognition(Task):
    """Audio becomes text, character by character (CTC: Graves et al., ICML 2006).

    For models that read waveforms, as wav2vec2, hubert and wavlm do.
    """

    type: Literal["speech_recognition"]
    audio_column: str = "audio"
    """Column with the audio: a file's path (WAV, FLAC, OGG, MP3), its bytes, `{bytes, path}`, or
    `{array, sampling_rate}`."""
    text_column: str = "text"
    """Column with the transcript."""
    lower_case: bool | Literal["auto"] = "auto"
    """Learn and compare in lower case. `auto`: in upper case for a `vocabulary` that has only upper case."""
    sampling_rate_hz: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Samples per second that the model hears; other audio is resampled. `auto`: the model's own, else 16,000."""
    normalize: bool | Literal["auto"] = "auto"
    """Bring each recording to mean 0 and variance 1. `auto`: as the model's own feature extractor, else true."""
    max_audio_s: Annotated[float, Field(gt=0)] = 20.0
    """Longer audio is a bad row: it cannot be cut without its text."""
    frame_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Samples per output of the model. `auto`: the product of its config's `conv_stride`."""
    labels: tuple[str, ...] | None = None
    """The characters. Default: those of the vocabulary, else of the training rows, sorted."""
    vocabulary: tuple[str, ...] | Literal["auto"] | None = "auto"
    """Token of each output, a blank between words as " ". `auto`: that of a pretrained CTC head, which is then kept.
    `null`: a new head for `labels`."""
    blank: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Index of CTC's blank output. `auto`: `pad_token_id` of a pretrained CTC head, else 0."""

    metric_names: ClassVar[tuple[str, ...]] = ("wer", "cer", "loss")
    default_metric: ClassVar[str] = "wer"
    auto_class: ClassVar[str] = "AutoModelForCTC"
    pipeline_tag: ClassVar[str] = "automatic-speech-recognition"
    peft_task: ClassVar[str] = ""
    no_soft_targets: ClassVar[str] = "CTC does not know which frame says which character"
    reads_text: ClassVar[bool] = False
    required_inputs: ClassVar[tuple[str, ...]] = ("input_values",)
    kept_features: ClassVar[tuple[str, ...]] = ("reference",)
    default_global_batch_size: ClassVar[int] = 16
    default_global_batch_size_source: ClassVar[str] = (
        "a start and no more: recipes count seconds of audio instead of rows"
    )
    tuned_lrs: ClassVar[Mapping[str, Rate]] = SPEECH_TUNED
    new_lrs: ClassVar[BY_SIZE] = SPEECH_NEW
    own_of_model: ClassVar[tuple[str, ...]] = SETTINGS
    sources: ClassVar[Mapping[str, str]] = {
        "sampling_rate_hz": "the model's own; wav2vec 2.0, HuBERT and WavLM were pre-trained on 16,000",
        "normalize": "the model's own feature extractor",
        "max_audio_s": "a limit to the memory of a batch and no more",
        "frame_samples": "the model's conv_stride; wav2vec 2.0 has 320: Baevski et al., arXiv 2006.11477, 4.2",
        "vocabulary": "that of the pretrained CTC head, where there is one",
        "blank": "pad_token_id of the pretrained CTC head, else 0",
    }

    def broken_rules(self, has_eval: bool) -> Iterator[Problem]:
        yield from super().broken_rules(has_eval)
        if isinstance(self.vocabulary, tuple):
            if len(set(self.vocabulary)) != len(self.vocabulary):
                why = "list each token once"
                yield Problem("task.vocabulary", "holds a token twice", why, self.vocabulary)
            if self.blank == "auto" or self.blank >= len(self.vocabulary):
                what = f"must be an output, 0 to {len(self.vocabulary) - 1}"
                yield Problem("task.blank", what, "name the blank's place in it", self.blank)

    def filled(self, source: str | None, revision: str | None, config: Mapping[str, Any]) -> Self:
        own = (
            own_vocabulary(source, revision, config)
            if source and self.labels is None and self.vocabulary == "auto"
            else None
        )
        extractor = own_settings(source, revision) if source else {}
        strides = config.get("conv_stride")
        found: dict[str, Any] = {
            "sampling_rate_hz": int(extractor.get("sampling_rate", 16_000)),
            "normalize": bool(extractor.get("do_normalize", True)),
            "frame_samples": math.prod(strides) if strides else 320,
            "vocabulary": own[0] if own else None,
            "blank": own[1] if own else 0,
        }
        named = {"labels": own[0]} if own else {}
        return self.with_fields({**{name: found[name] for name in self.open_fields}, **named})

    @property
    def settled(self) -> Any:
        """The task without open fields; those that no model has filled have the usual values."""
        return self.filled(None, None, {}) if self.open_fields else self

    def outputs(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Token of each output."""
        vocabulary = self.vocabulary
        return vocabulary if isinstance(vocabulary, tuple) else (PADDING, *labels)

    def head_is_new(self, config: Mapping[str, Any]) -> bool:
        named = config.get("architectures") or ()
        return not isinstance(self.vocabulary, tuple) and any(
            str(name).endswith("ForCTC") for name in named
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.audio_column, self.text_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.audio_column,)

    @property
    def label_source(self) -> str | None:
        given = self.labels is not None or isinstance(self.vocabulary, tuple)
        return None if given else self.text_column

    def labels_in(self, value: Any) -> Iterable[str]:
        return self._said(value) if isinstance(value, str) else ()

    def _said(self, text: str) -> str:
        words = " ".join(text.split())
        if self.lower_case == "auto" and isinstance(self.vocabulary, tuple):
            letters = {one for token in self.vocabulary if len(token) == 1 for one in token}
            lower = any(one.islower() for one in letters)
            return words.lower() if lower or not any(map(str.isupper, letters)) else words.upper()
        return words.lower() if self.lower_case else words

    def features(self) -> dict[str, FeatureKind]:
        return {"audio": "floats", "characters": "ints", "reference": "text"}

    def length(self, row: EncodedRow) -> int:
        return max(1, len(row["audio"]) // int(self.settled.frame_samples))

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        task = self.settled
        index = {token: i for i, token in enumerate(task.outputs(labels)) if i != task.blank}
        return [task._encoded(row, index) for row in rows]

    def _encoded(self, row: RawRow, index: dict[str, int]) -> EncodedRow | BadRow:
        if why := text_problem(row.get(self.text_column), self.text_column):
            return BadRow(why)
        text = self._said(row[self.text_column])
        if unknown := sorted(set(text) - index.keys()):
            advice = "; task.vocabulary=null begins with a new head" if self.vocabulary else ""
            return BadRow(
                f"character {unknown[0]!r} is not among the {len(index)} that are known{advice}"
            )
        audio = self._samples(row.get(self.audio_column))
        if isinstance(audio, BadRow):
            return audio
        ids = [index[character] for character in text]
        # Between two equal characters CTC needs a blank.
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        if len(audio) // int(self.frame_samples) <= needed:
            return BadRow(f"{len(audio)} samples are too short for {len(ids)} characters")
        return {
            "audio": audio,
            "characters": ids,
            "reference": text,
            "n_targets": len(ids),
            "truncated": 0,
        }

    def _samples(self, value: Any) -> np.ndarray | BadRow:
        """Mono samples (n,), of mean 0 and variance 1 where the model wants it, or why there are none."""
        import numpy as np

        rate = int(self.sampling_rate_hz)
        mono = open_sound(value, self.audio_column, rate)
        if isinstance(mono, BadRow):
            return mono
        if not 0 < len(mono) <= self.max_audio_s * rate:
            return BadRow(f"lasts {len(mono) / rate:.1f} s, task.max_audio_s is {self.max_audio_s}")
        if self.normalize:
            mono = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7)
        return mono.astype(np.float32)

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        names = dict(enumerate(self.outputs(labels)))
        return {
            "vocab_size": len(names),
            "pad_token_id": self.settled.blank,  # the blank of `transformers`' CTC models
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
        }

    def input_problem(self, config: Any) -> str | None:
        strides = list(getattr(config, "conv_stride", None) or ())
        samples = math.prod(strides)
        if strides and self.frame_samples not in ("auto", samples):
            return f"gives one output per {samples} samples: set task.frame_samples={samples}"
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
        return (losses(scores, frames, batch, self.settled.blank) * batch["weights"]).sum()

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
        blank = self.settled.blank
        found = losses(scores, frames, batch, blank)
        return {
            "loss": found.double().cpu().numpy(),
            "n_targets": batch["label_lengths"].cpu().numpy(),
            "heard": ragged(likeliest(scores, frames, blank)),
        }

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Edits over all words, or characters, of the references."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        outputs = self.outputs(labels)
        heard = [text_of(ids, outputs) for ids in gathered["heard"]]
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

        names, task = model.config.id2label, self.settled
        outputs = [names[i] for i in range(len(names))]
        out = []
        for row in rows:
            value = row[self.audio_column]
            named = {"audio": value} if isinstance(value, str) else {}
            audio = task._samples(value)
            if isinstance(audio, BadRow):
                out.append({**named, "text": None, "why": audio.why})
                continue
            batch = {name: tensor.to(model.device) for name, tensor in _waves([audio]).items()}
            with torch.no_grad():
                (ids,) = likeliest(*self._scores(model, batch), task.blank)
            out.append({**named, "text": text_of(ids, outputs)})
        return out

    def exported_files(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """A feature extractor and a CTC tokenizer, as `transformers` reads them."""
        task, outputs = self.settled, self.outputs(labels)
        delimiter = DELIMITER if DELIMITER not in outputs else "<space>"
        tokens = [delimiter if token == " " else token for token in outputs]
        marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        return {
            "preprocessor_config.json": {
                "feature_extractor_type": "Wav2Vec2FeatureExtractor",
                "feature_size": 1,
                "sampling_rate": task.sampling_rate_hz,
                "padding_value": 0.0,
                "do_normalize": task.normalize,
                "return_attention_mask": True,
            },
            "vocab.json": {token: i for i, token in enumerate(tokens)},
            "tokenizer_config.json": {
                "tokenizer_class": "Wav2Vec2CTCTokenizer",
                "pad_token": tokens[task.blank],
                **{name: token if token in tokens else None for name, token in marks.items()},
                "word_delimiter_token": delimiter,
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
