"""A conversation → token ids, and which of them are learned.

All of a conversation goes to the chat template. A turn of the assistant is learned as it stands in the
rendered text, from the end of its generation prompt to its end-of-turn token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.tasks.chat_tokens import mask_control_text, tokens_of
from orchestrator.tasks.messages import (
    Conversation,
    Message,
    Unusable,
    is_messages,
    list_of_messages,
    read_message,
    read_tools,
)
from orchestrator.tasks.rendering import best_shape, left_out, renderer, unread_keys
from orchestrator.tasks.spans import Locator, Turn, ends_in_marker


@dataclass(frozen=True)
class Encoded:
    """Token ids, 1 for each that is learned, and remarks on the row."""

    ids: list[int]
    targets: list[int]
    notes: tuple[str, ...] = ()


def encode_conversation(conversation: Conversation, tokenizer: Any) -> Encoded:
    """Render and tokenize a conversation, and mark the turns that are learned.

    Raises Unusable where the template refuses it, or nothing of it can be learned.
    """
    masked, hidden = mask_control_text(conversation, tokenizer)
    render = renderer(tokenizer, masked.tools)
    notes = [*conversation.notes, *unread_keys(masked, render)]
    if hidden.texts:
        notes.append("text of special tokens inside messages is encoded as plain text")
    masked = best_shape(masked, render)
    locator = Locator(masked.messages, render)
    wanted = [i for i, on in enumerate(masked.learned) if on]
    turns = locator.turns(wanted)
    text = locator.text
    notes += left_out(masked, text, render)
    if len(turns) < len(wanted):
        notes.append(
            "some assistant turns cannot be told apart in the chat template's text: not learned"
        )
    last = masked.last_assistant
    if last in turns:
        text, turns[last] = _as_written(locator, turns[last], masked.messages[last])
    spans = [t for _, t in sorted(turns.items()) if t.body(text, locator.closing).strip()]
    if len(spans) < len(turns):
        notes.append("some assistant turns are empty in the chat template's text: not learned")
    if spans and not any(ends_in_marker(text[t.start : t.stop], locator.markers) for t in spans):
        notes.append("the chat template ends no assistant turn with a token: no end is learned")
    if not spans:
        raise Unusable("the chat template renders no assistant turn to learn from")
    ids, targets = tokens_of(text, spans, hidden, tokenizer)
    return Encoded(ids, targets, tuple(dict.fromkeys(notes)))


def generation_prompt(value: Any, tokenizer: Any, tools: Any = None) -> list[int]:
    """Return the token ids after which a model answers a text, or a list of messages.

    An answer that the messages end with is left out. Raises Unusable where they cannot be rendered.
    """
    if is_messages(value):
        messages = [read_message(turn, "messages") for turn in list_of_messages(value)]
        while len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        messages = [{"role": "user", "content": str(value)}]
    asked = Conversation(tuple(messages), (False,) * len(messages), read_tools(tools))
    masked, hidden = mask_control_text(asked, tokenizer)
    render = renderer(tokenizer, masked.tools)
    text = render(best_shape(masked, render).messages, prompt=True)
    return tokens_of(text, [], hidden, tokenizer)[0]


def _as_written(locator: Locator, turn: Turn, message: Message) -> tuple[str, Turn]:
    """Put back what the template cuts from the last answer (thinking, as DeepSeek-R1's does).

    Returns the text and the turn as they are where nothing is cut.
    """
    text, content = locator.text, message.get("content")
    body = turn.body(text, locator.closing)
    shown = text[max(0, turn.start - len(locator.prompt)) : turn.stop]
    if not isinstance(content, str) or not body.strip():
        return text, turn
    if _squeezed(content) in _squeezed(shown) or not _squeezed(content).endswith(_squeezed(body)):
        return text, turn
    head, tail = text[: turn.start], text[turn.start + len(body) : turn.stop]
    head, content = _joined_to_prompt(head, content, locator)
    stop = len(head) + len(content) + len(tail)
    return head + content + tail + text[turn.stop :], Turn(len(head), stop)


def _joined_to_prompt(head: str, content: str, locator: Locator) -> tuple[str, str]:
    """Complete the generation prompt, and take from the answer what the prompt says already."""
    if rest := locator.rest_of_prompt(head):
        given = next((g for g in (rest, rest.rstrip()) if content.startswith(g)), None)
        return (head + rest, content) if given is None else (head + given, content[len(given) :])
    for length in range(min(len(head), len(content), len(locator.prompt)), 0, -1):
        if head.endswith(content[:length]) and locator.markers.search(content[:length]):
            return head, content[length:]
    return head, content


def _squeezed(text: str) -> str:
    return "".join(text.split())
