"""Two answers to one prompt → token ids of both, the answers learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.tasks.base import BadRow, text_problem
from orchestrator.tasks.conversation import Encoded
from orchestrator.tasks.messages import (
    Message,
    Unusable,
    is_messages,
    list_of_messages,
    read_message,
    shared_length,
)
from orchestrator.tasks.templating import begun, chat, ended, instruction

Sides = tuple[Encoded, Encoded]


def encode_pair(
    values: Sequence[Any],
    columns: tuple[str, str, str],
    tokenizer: Any,
    tools: Any = None,
    prompt_required: bool = True,
) -> Sides | BadRow:
    """Encode two answers, each after its prompt.

    Answers are texts, or lists of messages (or their JSON text) of which the shared beginning is the
    prompt. Without a prompt, texts share one too: what both begin with.

    Args:
        values: The prompt (a text, a list of messages, or None), the better and the worse answer.
        columns: Names of their three columns, for error messages.
        tokenizer: The tokenizer.
        tools: What the tools column holds, None without one.
        prompt_required: Refuse texts without a prompt that do not begin alike; else all of them is the answer.
    """
    prompt, chosen, rejected = values
    as_messages = [is_messages(one) for one in values]
    if not any(as_messages) and tools is None:
        if prompt is None and prompt_required:
            return _texts(chosen, rejected, columns[1:], tokenizer)
        if prompt is None:
            return _both(
                [_text(t, c, tokenizer) for t, c in zip(values[1:], columns[1:], strict=True)]
            )
        sides = [
            instruction(prompt, answer, (columns[0], column), tokenizer)
            for answer, column in zip((chosen, rejected), columns[1:], strict=True)
        ]
        return _both(sides)
    try:
        beginning = _messages(prompt, "user", columns[0]) if prompt is not None else []
        answers = [
            _with_prompt(beginning, _messages(answer, "assistant", column))
            for answer, column in zip((chosen, rejected), columns[1:], strict=True)
        ]
    except Unusable as error:
        return BadRow(str(error))
    if answers[0] == answers[1]:
        return BadRow("both answers are the same")
    given = max(shared_length(*answers), _answered(answers, beginning))
    encoded = [
        chat(answer, column, tokenizer, tools, given=given)
        for answer, column in zip(answers, columns[1:], strict=True)
    ]
    return _both(encoded)


def encode_answer(
    prompt: Any, answer: Any, columns: tuple[str, str], tokenizer: Any, tools: Any = None
) -> Encoded | BadRow:
    """Encode one answer after its prompt, with the token ids that `encode_pair` gives it.

    Args:
        prompt: A text, a list of messages, or None.
        answer: A text, or a list of messages with or without the prompt's.
        columns: Names of the two columns, for error messages.
        tokenizer: The tokenizer.
        tools: What the tools column holds, None without one.
    """
    if not (is_messages(prompt) or is_messages(answer)) and tools is None:
        if prompt is None:
            return _text(answer, columns[1], tokenizer)
        return instruction(prompt, answer, columns, tokenizer)
    try:
        beginning = _messages(prompt, "user", columns[0]) if prompt is not None else []
        messages = _with_prompt(beginning, _messages(answer, "assistant", columns[1]))
    except Unusable as error:
        return BadRow(str(error))
    return chat(messages, columns[1], tokenizer, tools, given=len(beginning))


def _text(text: Any, column: str, tokenizer: Any) -> Encoded | BadRow:
    """Encode one whole text."""
    if why := text_problem(text, column):
        return BadRow(why)
    ids = ended(begun(text, tokenizer), tokenizer)
    return Encoded(ids, [1] * len(ids))


def _both(sides: Sequence[Encoded | BadRow]) -> Sides | BadRow:
    for side in sides:
        if isinstance(side, BadRow):
            return side
    first, second = sides
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    return first, second


def _messages(value: Any, role: str, column: str) -> list[Message]:
    """Return the messages of a column; a text is one of the given role."""
    if is_messages(value):
        return [_checked(turn, column) for turn in list_of_messages(value)]
    if why := text_problem(value, column):
        raise Unusable(why)
    return [{"role": role, "content": value}]


def _checked(turn: Any, column: str) -> Message:
    """Return a message, its marks of what is learned kept."""
    marks = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    return {**read_message(turn, column), **marks}


def _with_prompt(beginning: list[Message], answer: list[Message]) -> list[Message]:
    """Put the prompt's messages before an answer that does not hold them already."""
    shown = [m["content"] for m in answer if m["role"] == "user"]
    asked = [m["content"] for m in beginning if m["role"] == "user"]
    holds_prompt = bool(shown) and (not asked or shown[: len(asked)] == asked)
    if answer[: len(beginning)] == beginning or holds_prompt:
        return answer
    return [*beginning, *answer]


def _answered(answers: Sequence[Sequence[Message]], beginning: Sequence[Message]) -> int:
    """Number of messages of an explicit prompt, where both answers begin with it."""
    count = len(beginning)
    return count if all(list(a[:count]) == list(beginning) for a in answers) else 0


def _texts(chosen: Any, rejected: Any, columns: Sequence[str], tokenizer: Any) -> Sides | BadRow:
    """Encode two whole texts; learned are the tokens from the first word on which they differ."""
    texts = (chosen, rejected)
    for text, column in zip(texts, columns, strict=True):
        if why := text_problem(text, column):
            return BadRow(why)
    ids = [ended(begun(text, tokenizer), tokenizer) for text in texts]
    boundary = _word_boundary(chosen, rejected)
    most = len(begun(chosen[:boundary], tokenizer)) if boundary else 0
    count = min(shared_length(*ids), most)
    if count == 0:
        return BadRow(
            f"columns {columns[0]!r} and {columns[1]!r} begin with different words: "
            "no prompt can be told; add a prompt column"
        )
    sides = [Encoded(one, [0] * count + [1] * (len(one) - count)) for one in ids]
    return sides[0], sides[1]


def _word_boundary(one: str, other: str) -> int:
    """Characters that two texts share, up to the end of the last word that both have."""
    shared = shared_length(one, other)
    whole = (shared == len(one) or one[shared].isspace()) and (
        shared == len(other) or other[shared].isspace()
    )
    if whole and shared and not one[shared - 1].isspace():
        return shared
    while shared and not one[shared - 1].isspace():
        shared -= 1
    return len(one[:shared].rstrip())
