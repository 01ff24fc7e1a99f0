"""Connectionist temporal classification: outputs over time → text, and the vocabulary of pretrained heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DELIMITER = "|"
"""Stands for a blank between words in the vocabularies of `transformers`' CTC tokenizers."""


def own_vocabulary(
    source: str, revision: str | None, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], int] | None:
    """Return (token of each output, the blank's output) of a pretrained CTC head; None without one.

    Args:
        source: folder or hub id of the model.
        revision: branch, tag or commit on the hub.
        config: the model's own config.
    """
    kinds = config.get("architectures") or ()
    blank, size = config.get("pad_token_id", 0), config.get("vocab_size", 32)
    if not any(str(name).endswith("ForCTC") for name in kinds) or not isinstance(blank, int):
        return None
    found = _json(source, "vocab.json", revision)
    settings = _json(source, "tokenizer_config.json", revision) or {}
    if not isinstance(found, dict) or sorted(map(str, found.values())) != sorted(
        str(i) for i in range(len(found))
    ):
        return None  # none, or one for each of several languages
    if len(found) != size or not 0 <= blank < size:
        return None
    delimiter = settings.get("word_delimiter_token", DELIMITER)
    tokens = sorted(found, key=lambda token: int(found[token]))
    return tuple(" " if token == delimiter else token for token in tokens), blank


def own_settings(source: str, revision: str | None) -> dict[str, Any]:
    """Return the fields of a model's own feature extractor; none where it has none."""
    found = _json(source, "preprocessor_config.json", revision)
    return found if isinstance(found, dict) else {}


def _json(source: str, name: str, revision: str | None) -> Any:
    """The content of a model's file, from its folder or the hub's cache; None where it cannot be had."""
    from transformers.utils.hub import cached_file

    try:
        path = (
            Path(source) / name
            if Path(source).is_dir()
            else Path(cached_file(source, name, revision=revision) or "")
        )
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def losses(
    scores: torch.Tensor, frames: torch.Tensor, batch: Mapping[str, torch.Tensor], blank: int
) -> torch.Tensor:
    """Return the loss of each row (rows,), summed over its characters.

    Args:
        scores: log-probabilities (rows, frames, outputs).
        frames: how many frames of each row are real (rows,).
        batch: `labels` (rows, longest) and `label_lengths` (rows,).
        blank: the output that stands for no character.
    """
    import torch.nn.functional as functional

    return functional.ctc_loss(
        scores.transpose(0, 1),
        batch["labels"],
        frames,
        batch["label_lengths"],
        blank=blank,
        reduction="none",
    )


def likeliest(scores: torch.Tensor, frames: torch.Tensor, blank: int) -> list[list[int]]:
    """Return the likeliest output per frame; repeats are one, blanks none."""
    import torch

    best = scores.argmax(-1).cpu()
    rows = [torch.unique_consecutive(row[:n]) for row, n in zip(best, frames.tolist(), strict=True)]
    return [row[row != blank].tolist() for row in rows]


def text_of(ids: Sequence[int], outputs: Sequence[str]) -> str:
    """Join the tokens of outputs to words."""
    return " ".join("".join(outputs[i] for i in ids).split())
