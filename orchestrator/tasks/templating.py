"""Rows of text → token ids, and which of them are learnt: documents, prompts with answers, chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.tasks.base import BadRow, text_problem

if TYPE_CHECKING:
    import torch

Targets = tuple[list[int], list[int]]
"""Token ids, and 1 for each that is learnt."""


def plain(texts: Sequence[Any], column: str, tokenizer: Any) -> list[Targets | BadRow]:
    """Documents, every token learnt; in one call, which fast tokenizers spread over idle cores."""
    whys = [text_problem(text, column) for text in texts]
    good = [text for text, why in zip(texts, whys, strict=True) if why is None]
    encoded = tokenizer(good, add_special_tokens=True, verbose=False)["input_ids"] if good else []
    left = iter(encoded)
    return [BadRow(why) if why else _all_learnt(next(left), tokenizer) for why in whys]


def _all_learnt(ids: list[int], tokenizer: Any) -> Targets:
    ids = ended(ids, tokenizer)
    return ids, [1] * len(ids)


def instruction(
    prompt: Any, answer: Any, columns: tuple[str, str], tokenizer: Any
) -> Targets | BadRow:
    """A prompt and its answer, the answer learnt; as a chat where the tokenizer has a template."""
    why = text_problem(prompt, columns[0]) or text_problem(answer, columns[1])
    if why:
        return BadRow(why)
    if tokenizer.chat_template:
        turns = (("user", prompt), ("assistant", answer))
        messages = [{"role": role, "content": str(content)} for role, content in turns]
        return _templated(messages, tokenizer)
    head = tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"]
    tail = ended(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)
    return head + tail, [0] * len(head) + [1] * len(tail)


def chat(messages: Any, column: str, tokenizer: Any) -> Targets | BadRow:
    """Messages through the chat template, the assistant's turns learnt."""
    if not isinstance(messages, list | tuple) or not messages:
        return BadRow(f"column {column!r} must be a non-empty list of messages")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return BadRow(f"column {column!r}: a message needs `role` and `content`")
        if why := text_problem(turn.get("content"), f"{column}.content"):
            return BadRow(why)
        turns.append({"role": turn["role"], "content": turn["content"]})
    if all(turn["role"] != "assistant" for turn in turns):
        return BadRow(f"column {column!r} holds no assistant turn to learn from")
    if not tokenizer.chat_template:
        return BadRow("the tokenizer has no chat template; use task.rows.type: instruction")
    return _templated(turns, tokenizer)


def prompt_ids(text: str, as_chat: bool, tokenizer: Any) -> torch.Tensor:
    """Token ids (1, tokens) for generation to go on from."""
    if as_chat and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokenizer(text, return_tensors="pt")["input_ids"]


def _templated(messages: list[dict[str, str]], tokenizer: Any) -> Targets | BadRow:
    """Each assistant turn is what the template adds after its generation prompt."""
    import jinja2

    def render(turns: list[dict[str, str]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    spans: list[tuple[int, int]] = []
    try:
        text = render(messages)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(messages[:i], prompt=True), render(messages[: i + 1])
            if not (text.startswith(after.rstrip()) and after.startswith(before)):
                return BadRow("the chat template rewrites earlier turns: no telling what is learnt")
            spans.append((len(before), len(after.rstrip("\n"))))
    except jinja2.TemplateError as error:  # as in "roles must alternate"
        return BadRow(f"the chat template refuses it: {error}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Tokenizers that trim their offsets give a token of spaces an empty span at its end.
    targets = [
        int(any(a <= start and end <= b and (start < end or a < start) for a, b in spans))
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), targets


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids, closed by the tokenizer's end of text where it has one."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
