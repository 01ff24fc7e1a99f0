"""A question beside each part of a long context, and where an answer stands in a part."""

from __future__ import annotations

from typing import Any

from orchestrator.tasks.base import BadRow, EncodedRow

NO_ANSWER = 0
"""Position that start and end point to where a window does not hold the answer: `[CLS]`."""


def windows_of(
    question: str, context: str, tokenizer: Any, max_length: int, stride_tokens: int
) -> list[EncodedRow] | BadRow:
    """Windows of at most `max_length` tokens, consecutive ones sharing `stride_tokens` of the context.

    `char_starts` and `char_stops`: characters of the context's tokens, the first of which stands at
    `context_from`.
    """
    taken = len(tokenizer(question, "", verbose=False)["input_ids"])
    if taken + stride_tokens >= max_length:
        return BadRow(
            f"the question takes {taken} of {max_length} tokens, so windows that share "
            f"task.stride_tokens = {stride_tokens} do not fit"
        )
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride_tokens,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    kinds = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
    windows = []
    for i, ids in enumerate(encoded["input_ids"]):
        of_context = [k for k, side in enumerate(encoded.sequence_ids(i)) if side == 1]
        offsets = [encoded["offset_mapping"][i][k] for k in of_context]
        windows.append(
            {
                "input_ids": ids,
                "token_type_ids": kinds[i],
                "context_from": of_context[0] if of_context else len(ids),
                "char_starts": [start for start, _ in offsets],
                "char_stops": [stop for _, stop in offsets],
                "window": i,
                "context": "",
                "answers": "[]",
                "n_targets": 1,
            }
        )
    return windows


def tokens_of(span: tuple[int, int] | None, window: EncodedRow) -> tuple[int, int]:
    """First and last token of a span of characters, where the window holds all of it."""
    places = list(zip(window["char_starts"], window["char_stops"], strict=True))
    inside = [
        i for i, (start, stop) in enumerate(places) if span and start < span[1] and stop > span[0]
    ]
    if not span or not inside:
        return NO_ANSWER, NO_ANSWER
    first, last = inside[0], inside[-1]
    whole = places[first][0] <= span[0] and places[last][1] >= span[1]
    offset = window["context_from"]
    return (first + offset, last + offset) if whole else (NO_ANSWER, NO_ANSWER)
