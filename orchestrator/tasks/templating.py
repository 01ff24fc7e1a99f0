"""Rows of text → token ids, and which of them are learned: documents, and prompts with answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.tasks.base import BadRow, text_problem
from orchestrator.tasks.conversation import Encoded, encode_conversation, generation_prompt
from orchestrator.tasks.messages import TrainOn, Unusable, read_conversation

if TYPE_CHECKING:
    import torch


NO_END = "the tokenizer has no end-of-text token (eos_token): no end is learned"


def plain(texts: Sequence[Any], column: str, tokenizer: Any) -> list[Encoded | BadRow]:
    """Encode documents, every token learned, in one call, which fast tokenizers spread over idle cores."""
    whys = [text_problem(text, column) for text in texts]
    good = [text for text, why in zip(texts, whys, strict=True) if why is None]
    encoded = tokenizer(good, add_special_tokens=True, verbose=False)["input_ids"] if good else []
    left, head = iter(encoded), beginning(tokenizer)
    return [BadRow(why) if why else _all_learned(next(left), head, tokenizer) for why in whys]


def _all_learned(ids: list[int], head: list[int], tokenizer: Any) -> Encoded:
    if head and ids[len(head) : 2 * len(head)] == head:  # the text begins with it already
        ids = ids[len(head) :]
    ids = ended(ids, tokenizer)
    return Encoded(ids, [1] * len(ids), _endless(tokenizer))


def instruction(
    prompt: Any, answer: Any, columns: tuple[str, str], tokenizer: Any
) -> Encoded | BadRow:
    """Encode a prompt and its answer, the answer learned; as a chat where the tokenizer has a template."""
    why = text_problem(prompt, columns[0]) or text_problem(answer, columns[1])
    if why:
        return BadRow(why)
    if tokenizer.chat_template:
        turns = (("user", prompt), ("assistant", answer))
        return chat([{"role": role, "content": text} for role, text in turns], "row", tokenizer)
    head = begun(prompt, tokenizer)
    tail = ended(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)
    targets = [0] * len(head) + [1] * len(tail)
    return Encoded(head + tail, targets, _endless(tokenizer))


def chat(
    messages: Any,
    column: str,
    tokenizer: Any,
    tools: Any = None,
    train_on: TrainOn = "all",
    given: int = 0,
) -> Encoded | BadRow:
    """Encode messages through the chat template, the assistant's turns learned.

    Args:
        messages: A list of messages, or its JSON text.
        column: The column they are from.
        tokenizer: A tokenizer with a chat template.
        tools: What the tools column holds, None without one.
        train_on: Learn every turn of the assistant, or only the last.
        given: Number of messages at the beginning that are a prompt.
    """
    try:
        conversation = read_conversation(messages, column, tools, train_on, given)
        return encode_conversation(conversation, tokenizer)
    except Unusable as error:
        return BadRow(str(error))


def prompt_ids(prompt: Any, as_chat: bool, tokenizer: Any, tools: Any = None) -> torch.Tensor:
    """Return token ids (1, tokens) for generation to continue.

    `prompt` is a text, or messages where `as_chat`. Raises DataError where it cannot be rendered.
    """
    import torch

    from orchestrator.errors import DataError

    if not (as_chat and tokenizer.chat_template):
        return torch.tensor([begun(str(prompt), tokenizer)])
    try:
        return torch.tensor([generation_prompt(prompt, tokenizer, tools)])
    except Unusable as error:
        raise DataError(f"{prompt!r:.200}: {error}") from error


def begun(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that something follows: with the tokenizer's beginning, not its end."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = beginning(tokenizer)
    return ids if ids[: len(head)] == head else [*head, *ids]


def beginning(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before every text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    count = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return list(framed[:count])


def _end(tokenizer: Any) -> int | None:
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


def _endless(tokenizer: Any) -> tuple[str, ...]:
    """Return a remark where the tokenizer has no end of text."""
    return () if _end(tokenizer) is not None else (NO_END,)


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the ids, closed by the tokenizer's end of text where it has one."""
    end = _end(tokenizer)
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
