"""A row's messages and tools: read, checked, and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.tasks.base import text_problem
from orchestrator.tasks.labels import list_in

Message = dict[str, Any]
TrainOn = Literal["all", "last"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which data and templates know what a model thinks before it answers."""
TRAIN_KEYS = ("weight", "train")
"""Keys by which a message says whether it is learned; templates never see them."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    "function": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
}
"""Names of roles in data, in any case: the names that chat templates know. Others go to the template as they are."""


class Unusable(ValueError):
    """A row that cannot be rendered, with the reason."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a template, which of them are learned, and the tools on offer."""

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    """For each message; only an assistant's turn is ever learned."""
    tools: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    """Remarks on the row that do not keep it from being used."""

    @property
    def last_assistant(self) -> int:
        """Index of the last assistant turn, -1 without one."""
        found = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return found[-1] if found else -1


def read_conversation(
    value: Any, column: str, tools: Any = None, train_on: TrainOn = "all", given: int = 0
) -> Conversation:
    """Return the conversation in a column: a list of messages, or the JSON text of one.

    Args:
        value: What the column holds.
        column: Its name, for error messages.
        tools: What the tools column holds, None without tools.
        train_on: Learn every assistant turn, or only the last.
        given: Number of messages at the beginning that are a prompt and never learned.

    Raises:
        Unusable: The messages or the tools cannot be used, or nothing in them is learned.
    """
    if value is None:
        raise Unusable(f"column {column!r} is missing or null")
    raw = list_of_messages(value)
    if not isinstance(raw, list | tuple) or not raw:
        raise Unusable(
            f"column {column!r} must be a non-empty list of messages, or the JSON text of one"
        )
    notes: list[str] = []
    messages = [read_message(turn, column) for turn in raw]
    learned = [
        message["role"] == "assistant" and i >= given and _is_trained(turn, column, notes)
        for i, (message, turn) in enumerate(zip(messages, raw, strict=True))
    ]
    found = Conversation(tuple(messages), tuple(learned), read_tools(tools), tuple(notes))
    if train_on == "last":
        last = found.last_assistant
        learned = [on and i == last for i, on in enumerate(learned)]
        found = Conversation(found.messages, tuple(learned), found.tools, found.notes)
    if not any(learned):
        roles = ", ".join(sorted({repr(m["role"]) for m in messages}))
        raise Unusable(f"column {column!r} holds no assistant turn to learn from (roles: {roles})")
    return found


def from_json(value: Any) -> Any:
    """Return the list or object that a text holds as JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def list_of_messages(value: Any) -> Any:
    """Return the list that a text holds as JSON, or as Python writes it; one message as a list of it.

    Any other value is returned as it is.
    """
    found = from_json(value)
    if isinstance(found, str) and found.lstrip()[:2] in ("[{", "[ "):
        written = list_in(found)
        return found if written is None else written
    if isinstance(found, Mapping) and ("role" in found or "from" in found):
        return [found]
    return found


def is_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, or the JSON text of one."""
    found = list_of_messages(value)
    return (
        isinstance(found, list | tuple)
        and bool(found)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found)
    )


def read_message(turn: Any, column: str) -> Message:
    """Return one message without nulls, its content a text (or None beside tool calls).

    Raises Unusable where role or content cannot be used.
    """
    if not isinstance(turn, Mapping):
        raise Unusable(f"column {column!r}: a message needs `role` and `content`, got {turn!r:.80}")
    message = {k: without_nulls(v) for k, v in turn.items() if v is not None}
    for key in TRAIN_KEYS:
        message.pop(key, None)
    if "role" not in message and "from" in message:
        _from_sharegpt(message, column)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise Unusable(f"column {column!r}: a message needs `role` and `content`")
    message["role"] = ROLES.get(role.strip().lower(), role)
    if isinstance(call := message.pop("function_call", None), dict):
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], column)
        if not message["tool_calls"]:
            del message["tool_calls"]
    _set_content(message, column)
    _set_reasoning(message, column)
    return message


def _from_sharegpt(message: Message, column: str) -> None:
    """Rename ShareGPT's `from` and `value`, and its roles."""
    role = message.pop("from")
    if role not in SHAREGPT_ROLES:
        raise Unusable(
            f"column {column!r}: unknown ShareGPT role {role!r}. "
            f"Use {', '.join(SHAREGPT_ROLES)}, or `role` and `content`"
        )
    message["role"] = SHAREGPT_ROLES[role]
    if "value" in message:
        message["tool_calls" if role == "function_call" else "content"] = message.pop("value")


def _set_content(message: Message, column: str) -> None:
    """Make the content a text; None where a turn has only calls or reasoning."""
    content, role = message.get("content"), message["role"]
    if isinstance(content, list | tuple):
        content = _joined(content, message, column)
    elif isinstance(content, Mapping) and role == "tool":
        content = json.dumps(content, ensure_ascii=False)
    elif content is None and role == "system":
        content = ""
    elif content is None and role != "assistant":
        raise Unusable(f"column {f'{column}.content'!r} is missing or null in a {role} message")
    if content is not None and (not isinstance(content, str) or content.strip()):
        why = text_problem(content, f"{column}.content")
        if why:
            raise Unusable(why)
    if "tool_calls" in message and not (content or "").strip():
        content = None  # an empty text beside calls is how some write none
    message["content"] = content


def _joined(parts: Sequence[Any], message: Message, column: str) -> str:
    """Return the text of a content's parts; thinking parts become the message's reasoning."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            message.setdefault("reasoning_content", part[kind])
        elif isinstance(part, Mapping) and kind in ("text", "input_text", "output_text"):
            if why := text_problem(part.get("text") or " x", f"{column}.content.text"):
                raise Unusable(why)
            texts.append(part.get("text") or "")
        else:
            raise Unusable(
                f"column {column!r}: a content part of type {kind!r} is no text; "
                "only text parts can be learned from here"
            )
    return "".join(texts)


def _set_reasoning(message: Message, column: str) -> None:
    """Give reasoning both names that templates read it by."""
    found = [message.pop(key) for key in REASONING_KEYS if key in message]
    if not found or found[0] == "":
        return
    if why := text_problem(found[0], f"{column}.reasoning_content"):
        raise Unusable(why)
    message["reasoning_content"] = message["thinking"] = found[0]


def _tool_calls(value: Any, column: str) -> list[dict[str, Any]]:
    calls = from_json(value)
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        raise Unusable(f"column {column!r}: `tool_calls` must be a list of objects, got {calls!r}")
    return [
        {"type": "function", "function": dict(call)}
        if "name" in call and "function" not in call
        else {"type": "function", **call}
        for call in calls
    ]


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row: a list of JSON schemas, or the JSON text of one.

    Raises Unusable for anything else.
    """
    tools = from_json(value)
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return ()
    if isinstance(tools, Mapping):
        tools = [tools]
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list | tuple) else None
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable(f"tools must be a list of JSON objects, or its JSON text, got {value!r:.80}")
    cleaned: list[dict[str, Any]] = without_nulls(tools)
    return tuple(cleaned)


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts or lists."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def without_nulls(value: Any) -> Any:
    """Drop null fields at any depth: Arrow gives every struct of a column all fields of all others."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value


def _is_trained(turn: Mapping[str, Any], column: str, notes: list[str]) -> bool:
    """Read a message's `weight` or `train`; without them it is learned."""
    for key in TRAIN_KEYS:
        value: Any = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str):
            value = {"true": 1, "false": 0}.get(value.lower(), value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise Unusable(f"column {column!r}: `{key}` must be 0 or 1, got {value!r}") from None
        if number not in (0, 1):
            notes.append(f"message key {key!r} is neither 0 nor 1: above 0 is taken as 1")
        return number > 0
    return True
