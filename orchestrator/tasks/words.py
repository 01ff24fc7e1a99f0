"""Words → token ids, and the place of each word's first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.tasks.base import EncodedRow

NO_TOKEN = -1
"""Stands for the position of a word without a token: one cut off, or of which nothing is left."""


def aligned(words: Sequence[str], tokenizer: Any, max_length: int) -> EncodedRow:
    """Return `input_ids` of at most `max_length` tokens, and `positions` (words,) of first tokens."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            list(words), is_split_into_words=True, truncation=True, max_length=max_length
        )
        ids, owners = encoded["input_ids"], encoded.word_ids()
        truncated = bool(encoded.encodings[0].overflowing)
    else:
        ids, owners, truncated = _word_by_word(words, tokenizer, max_length)
    positions = [NO_TOKEN] * len(words)
    for position, word in reversed(list(enumerate(owners))):
        if word is not None:
            positions[word] = position
    return {
        "input_ids": ids,
        "positions": positions,
        "n_targets": sum(position != NO_TOKEN for position in positions),
        "truncated": int(truncated),
    }


def _word_by_word(
    words: Sequence[str], tokenizer: Any, max_length: int
) -> tuple[list[int], list[int | None], bool]:
    """(token ids, word of each token or None, whether some were cut off) for a tokenizer in Python, which
    does not tell what its tokens came from."""
    tokens = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in words]
    room = max_length - len(tokenizer.build_inputs_with_special_tokens([]))
    flat = [token for of_word in tokens for token in of_word]
    owners: list[int | None] = [i for i, of_word in enumerate(tokens) for _ in of_word]
    kept = flat[: max(room, 0)]
    ids = list(tokenizer.build_inputs_with_special_tokens(kept))
    before = _tokens_before(tokenizer)
    framed = [None] * before + owners[: len(kept)]
    return ids, framed + [None] * (len(ids) - len(framed)), len(kept) < len(flat)


def _tokens_before(tokenizer: Any) -> int:
    """Control tokens in front of a text: those that two different texts begin with."""
    ids = range(len(tokenizer))
    pair = (tokenizer.build_inputs_with_special_tokens([i]) for i in (ids[-1], ids[-2]))
    same = [a == b for a, b in zip(*pair, strict=True)]
    return next((i for i, equal in enumerate(same) if not equal), 0)
