"""A conversation through a chat template, in the form of its fields that the template can read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from orchestrator.tasks.messages import (
    REASONING_KEYS,
    Conversation,
    Message,
    Unusable,
    from_json,
)

NO_TEMPLATE = (
    "the tokenizer has no chat template; set model.chat_template to a Jinja file, "
    "or use task.rows.type: instruction"
)
ALWAYS_READ = ("role", "content", "tool_call_id")
"""Keys without remarks: few templates repeat the number of the call that a tool answers."""
Arguments = Literal["object", "text"]
NoContent = Literal["absent", "none", "empty"]
ARGUMENTS: tuple[Arguments, ...] = ("object", "text")
NO_CONTENT: tuple[NoContent, ...] = ("absent", "none", "empty")


class TemplateError(Unusable):
    """A template's own refusal, or any error it raised."""


@dataclass(frozen=True)
class Renderer:
    """The tokenizer's chat template with one row's tools."""

    tokenizer: Any
    template: str
    tools: tuple[dict[str, Any], ...] = ()

    def __call__(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Return the text of the messages, followed by the beginning of an answer if `prompt`.

        Raises TemplateError for whatever the template raises.
        """
        return self._render(messages, add_generation_prompt=prompt)[0][0]

    def marked(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Return the (start, stop) characters that the template's own generation marks enclose."""
        marks = self._render(messages, return_assistant_tokens_mask=True)[1]
        return [(start, stop) for start, stop in marks[0] if start < stop]

    def _render(self, messages: Sequence[Message], **options: Any) -> tuple[list[str], list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(self.tools) or None,
                chat_template=self.template,
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TemplateError(f"the chat template refuses it: {first:.300}") from error
        texts, marks = found
        return texts, marks

    def reads(self, name: str) -> bool:
        """Tell whether the template's source mentions a field."""
        return name in self.template


def renderer(tokenizer: Any, tools: tuple[dict[str, Any], ...] = ()) -> Renderer:
    """Return the renderer of a tokenizer; raises Unusable where it has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise Unusable(NO_TEMPLATE)
    try:
        template = tokenizer.get_chat_template(None, list(tools) or None)
    except ValueError as error:  # several templates, none of them the default
        raise Unusable(str(error).splitlines()[0]) from error
    return Renderer(tokenizer, template, tools)


@dataclass(frozen=True)
class Shape:
    """One form of the fields on which templates differ."""

    arguments: Arguments = "object"
    """Arguments of tool calls: most templates serialize an object, some join a text."""
    no_content: NoContent = "absent"
    """Content of a turn that has only tool calls."""
    parts: bool = False
    """Content as a list of text parts."""
    empty_system: bool = True
    """Empty system turns are kept."""


def shaped(conversation: Conversation, shape: Shape) -> Conversation:
    """Return the conversation with its fields in one form."""
    pairs = [
        (_shaped(message, shape), on)
        for message, on in zip(conversation.messages, conversation.learned, strict=True)
        if shape.empty_system or message["role"] != "system" or message["content"].strip()
    ]
    return replace(
        conversation,
        messages=tuple(message for message, _ in pairs),
        learned=tuple(on for _, on in pairs),
    )


def _shaped(message: Message, shape: Shape) -> Message:
    out = dict(message)
    content = out.get("content")
    if content is None:
        del out["content"]
        if shape.no_content != "absent":
            out["content"] = None if shape.no_content == "none" else ""
    elif shape.parts:
        out["content"] = [{"type": "text", "text": content}]
    if "tool_calls" in out:
        out["tool_calls"] = [_shaped_call(call, shape) for call in out["tool_calls"]]
    return out


def _shaped_call(call: dict[str, Any], shape: Shape) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _shaped_call(call["function"], shape)}
    given = call.get("arguments")
    if shape.arguments == "text" and isinstance(given, dict):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if shape.arguments == "object":
        return {**call, "arguments": from_json(given)} if given is not None else call
    return call


@lru_cache(maxsize=16)
def reads_only_parts(render: Renderer) -> bool:
    """Tell whether a template shows text only in lists of parts; `render` must be without tools."""
    text = "58102937464"
    shown = []
    for content in (text, [{"type": "text", "text": text}]):
        try:
            shown.append(text in render([{"role": "user", "content": content}]))
        except TemplateError:
            shown.append(False)
    return shown == [False, True]


def shapes(conversation: Conversation, parts_first: bool = False) -> Iterator[Shape]:
    """Yield the forms that make a difference to this conversation, the most usual first."""
    messages = conversation.messages
    has_calls = any("tool_calls" in m for m in messages)
    lacks_content = any(m["content"] is None for m in messages)
    empty_system = any(m["role"] == "system" and not m["content"].strip() for m in messages)
    for kept, parts, no_content, arguments in product(
        (True, False) if empty_system and len(messages) > 1 else (True,),
        (parts_first, not parts_first),
        NO_CONTENT if lacks_content else NO_CONTENT[:1],
        ARGUMENTS if has_calls else ARGUMENTS[:1],
    ):
        yield Shape(arguments, no_content, parts, kept)


def best_shape(conversation: Conversation, render: Renderer) -> Conversation:
    """Return the conversation in the first form that the template renders with nothing left out.

    Where every form loses something, the one that loses least. Raises TemplateError where the
    template refuses all forms, with the reason of its own that it gave first.
    """
    best: tuple[int, Conversation] | None = None
    refusal: TemplateError | None = None
    for shape in shapes(conversation, reads_only_parts(replace(render, tools=()))):
        candidate = shaped(conversation, shape)
        try:
            text = render(candidate.messages)
        except TemplateError as error:
            if refusal is None or (is_undefined(refusal) and not is_undefined(error)):
                refusal = error
            continue
        lost = _lost(conversation, candidate, text)
        if lost == 0:
            return candidate
        if best is None or lost < best[0]:
            best = lost, candidate
    if best is None:
        raise refusal or TemplateError("the chat template renders no form of it")
    return best[1]


def is_undefined(error: TemplateError) -> bool:
    """Tell whether a template failed on a field that a form lacks, and gave no reason of its own."""
    from jinja2 import UndefinedError

    return isinstance(error.__cause__, UndefinedError | TypeError)


def _lost(conversation: Conversation, candidate: Conversation, text: str) -> int:
    """Count what a rendering lacks, or shows as Python instead of JSON."""
    lost = 0
    for message in conversation.messages:
        content = message["content"] or ""
        if message["role"] == "assistant":
            content = content.rpartition("</think>")[2]  # templates leave out earlier thinking
        lost += content.strip() not in text
        for call in message.get("tool_calls", ()):
            lost += str(call.get("function", call).get("name", "")) not in text
    for message in candidate.messages:
        if isinstance(message.get("content"), list):
            lost += str(message["content"]) in text
        for call in message.get("tool_calls", ()):
            given = call.get("function", call).get("arguments")
            lost += isinstance(given, dict) and bool(given) and _as_python(given, text)
    return lost


def _as_python(given: dict[str, Any], text: str) -> bool:
    """Tell whether a template has printed an object the way Python does."""
    printed = str(given)
    return printed in text and printed != json.dumps(given, ensure_ascii=False)


def left_out(conversation: Conversation, text: str, render: Renderer) -> list[str]:
    """Return remarks on text and tool calls of messages that a rendering lacks."""
    notes = []
    for message in conversation.messages:
        role, content = message["role"], message.get("content")
        if role == "assistant" and isinstance(content, str):
            content = content.rpartition("</think>")[2]  # templates leave out earlier thinking
        if isinstance(content, str) and role != "tool" and content.strip() not in text:
            notes.append(f"the chat template leaves out or changes a message of role {role!r}")
        for call in message.get("tool_calls", ()) if render.reads("tool_calls") else ():
            if not all(word in text for word in _words(call.get("function", call))):
                notes.append("the chat template leaves out tool calls beside text")
    return list(dict.fromkeys(notes))


def _words(value: Any) -> Iterator[str]:
    """Yield the texts in a call that every template writes as they are."""
    value = from_json(value)
    if isinstance(value, str) and value.isascii() and value.isalnum():
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _words(one)


def unread_keys(conversation: Conversation, render: Renderer) -> list[str]:
    """Return remarks on message keys, and tools, that the template never looks at."""
    keys = {key for message in conversation.messages for key in message if key not in ALWAYS_READ}
    if keys & set(REASONING_KEYS):
        keys -= set(REASONING_KEYS)
        if not any(map(render.reads, REASONING_KEYS)):
            keys.add(REASONING_KEYS[0])
    notes = [
        f"the chat template does not use the message key {key!r}"
        for key in sorted(keys)
        if not render.reads(key)
    ]
    if conversation.tools and not render.reads("tools"):
        notes.append("the chat template does not use tools")
    return notes
