"""Find the part of a rendered conversation that each assistant turn was written into.

A turn's span begins where the generation prompt ends and stops after the end-of-turn token. It is
taken from the template's own generation marks; else from comparing the rendering with that of the
messages before the turn; else from rendering the conversation again with a sentinel in place of the
turn's text, so that all text around the sentinel is the template's.

See docs/decisions/0105-assistant-turns-are-found-by-rendering-with-a-sentinel.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from orchestrator.tasks.messages import Message, shared_length
from orchestrator.tasks.rendering import Renderer, TemplateError

SENTINEL = "730192846"
"""Digits, which no template changes."""
USER: Message = {"role": "user", "content": "58102937461"}
ANSWER: Message = {"role": "assistant", "content": "58102937462"}
AGAIN: Message = {"role": "user", "content": "58102937463"}
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKER = r"<\|[^|<>\s]{1,40}\|>|</?[^<>\s]{1,40}>|\[/?[A-Z_]{1,30}\]"
"""Shapes of control text, for templates whose markers are no tokens of the tokenizer."""


@dataclass(frozen=True)
class Turn:
    """Position of one assistant turn in the rendered text."""

    start: int
    stop: int
    """After the end-of-turn token."""

    def body(self, text: str, closing: Collection[str]) -> str:
        """Return the turn's text without the tokens that end it."""
        body = text[self.start : self.stop].rstrip()
        while end := next((c for c in closing if body.endswith(c)), ""):
            body = body.removesuffix(end).rstrip()
        return body


@dataclass(frozen=True)
class Around:
    """The template's text on both sides of a turn's content."""

    before: str
    after: str
    end: int
    """Characters of `after` that belong to the turn: up to its end-of-turn token."""


def ends_in_marker(text: str, markers: re.Pattern[str]) -> bool:
    """Tell whether a turn's text ends with a control token."""
    found = markers.finditer(text, max(0, len(text) - 80))
    return any(match.end() == len(text) for match in found)


class Locator:
    """Locates the assistant turns of one conversation."""

    def __init__(self, messages: Sequence[Message], render: Renderer) -> None:
        self.messages = list(messages)
        self.render = render
        self.text = render(self.messages)
        habits = habits_of(replace(render, tools=()))
        self.prompt, self.closing, self.markers = habits.prompt, habits.closing, habits.markers
        self._common = habits.common
        number = 0
        while any(f"{SENTINEL}{number}" in text for text in (self.text, str(self.messages))):
            number += 1
        self.sentinel, self.before_sentinel = f"{SENTINEL}{number}8", f"{SENTINEL}{number}9"

    def turns(self, wanted: Sequence[int]) -> dict[int, Turn]:
        """Return the turns with the indices `wanted` that can be located."""
        if GENERATION_MARK.search(self.render.template):
            marked = self._by_marks(wanted)
            if marked is not None:
                return marked
        found = {i: self._by_prefix(i) or self._by_sentinel(i) or self._by_calls(i) for i in wanted}
        last = max(wanted)
        if found[last] is None:
            found[last] = self._by_difference(last)
        return {i: turn for i, turn in found.items() if turn is not None}

    # --- the template's own marks

    def _by_marks(self, wanted: Sequence[int]) -> dict[int, Turn] | None:
        """One turn per mark where the marks are as many as the assistant turns; None otherwise."""
        assistants = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        marks = self.render.marked(self.messages)
        if len(marks) != len(assistants):
            return None
        turns = {}
        for i, (start, stop) in zip(assistants, marks, strict=True):
            stop = start + len(self.text[start:stop].rstrip("\n"))
            start += self._marked_header(start, stop)
            closed = self.text[start:stop].endswith(tuple(self.closing))
            following = self.markers.match(self.text, stop)
            if not closed and following and following.group() in self.closing:
                stop = following.end()
            turns[i] = Turn(start, stop)
        return {i: turn for i, turn in turns.items() if i in wanted}

    def _marked_header(self, start: int, stop: int) -> int:
        """Return the characters of a marked text that repeat the generation prompt: a model never writes them."""
        marked = self.text[start:stop]
        common = self._common(marked, self.prompt)
        return common if self.markers.match(marked[:common]) else 0

    # --- comparison with the messages before

    def _by_prefix(self, i: int) -> Turn | None:
        """The text between the prompt for a turn and the rendering up to it, if neither changes later."""
        if not self.prompt:
            return None
        try:
            before = self.render(self.messages[:i], prompt=True)
            after = self.render(self.messages[: i + 1]).rstrip("\n")
        except TemplateError:
            return None
        if not (
            self.text.startswith(after) and after.startswith(before) and len(after) > len(before)
        ):
            return None
        if not before.endswith(self.prompt):  # written after a message, so not before the first one
            return None
        stop = len(after)
        if i == len(self.messages) - 1:
            stop = self._without_end_of_text(i, stop)
        return Turn(len(before), stop)

    def _without_end_of_text(self, i: int, stop: int) -> int:
        """Leave out what a template writes after the end-of-turn token of the very last turn."""
        around = self._around(i)
        if around is None:
            return stop
        tail, ended = around.after, around.end
        if self.text.rstrip("\n").endswith(tail.rstrip("\n")) and tail[:ended].strip():
            return len(self.text.rstrip("\n")) - len(tail.rstrip("\n")) + len(tail[:ended].rstrip())
        return stop

    # --- comparison with a sentinel

    def _by_sentinel(self, i: int) -> Turn | None:
        around = self._around(i)
        if around is None:
            return None
        start = len(around.before) - self._written_before_content(i, around.before)
        if not self.text.startswith(around.before[:start]):
            return None
        tail, ended = around.after, around.end
        if not self.text.endswith(tail[ended:]):
            return None
        stop = len(self.text) - len(tail) + len(tail[:ended].rstrip())
        if not self.text.endswith(tail):  # another end, as of a turn with tool calls
            stop = len(self.text[: len(self.text) - len(tail) + ended].rstrip())
        prompted = self.rest_of_prompt(around.before[:start])
        if prompted and self.text.startswith(prompted, start):
            start += len(prompted)
        return Turn(start, stop) if start < stop else None

    def _around(self, i: int) -> Around | None:
        """The template's text around turn `i`, None where its text is not rendered as it is."""
        for turn in self._replacements(i):
            before, after = self.messages[:i], self.messages[i + 1 :]
            try:
                parts = self.render([*before, turn, *after]).split(self.sentinel)
                alone = self.render([*before, turn]).split(self.sentinel)
            except TemplateError:
                continue
            if len(parts) != 2 or len(alone) != 2:
                continue
            longer = parts[1] if after else self._followed(before, turn)
            if longer is None:
                return Around(parts[0], parts[1], len(parts[1].rstrip("\n")))
            end = self._common_end(alone[1], longer, parts[1], is_last=not after)
            return Around(parts[0], parts[1], end)
        return None

    def _replacements(self, i: int) -> list[Message]:
        """The turn with the sentinel for its text: without its calls, else with them."""
        turn = {k: v for k, v in self.messages[i].items() if k in ("role", "name")}
        turn["content"] = self._content(self.sentinel, self.messages[i])
        with_calls = {**self.messages[i], "content": turn["content"]}
        return [turn, with_calls] if "tool_calls" in with_calls else [turn]

    def _content(self, text: str, like: Message) -> object:
        return [{"type": "text", "text": text}] if isinstance(like.get("content"), list) else text

    def _followed(self, before: Sequence[Message], turn: Message) -> str | None:
        """Return the text after the sentinel if the user speaks once more."""
        try:
            user = {**USER, "content": self._content(str(USER["content"]), turn)}
            parts = self.render([*before, turn, user]).split(self.sentinel)
        except TemplateError:
            return None
        return parts[1] if len(parts) == 2 else None

    def _common_end(self, alone: str, longer: str, tail: str, is_last: bool) -> int:
        """Length of the part of `tail` that ends the turn, whatever follows it."""
        common = self._common(alone, longer)
        if self.markers.search(tail[:common]):
            return common
        following = self.markers.match(tail, common)
        if following and (is_last or following.group() in self.closing):
            return following.end()
        return common

    def _written_before_content(self, i: int, before: str) -> int:
        """Characters before a turn's content that follow its generation prompt: the turn writes them."""
        between, prompted = self._header(i, before)
        common = self._common(between, prompted)
        rest = between[common:]
        if not rest:
            return 0
        spaces = len(rest) - len(rest.rstrip(" "))
        if not self.prompt:  # the template knows no generation prompt: all but spaces is the header
            return spaces
        return len(rest) if common == len(prompted) else spaces

    def _header(self, i: int, before: str) -> tuple[str, str]:
        """The template's text between the content before a turn and its own, and before an answer."""
        if i > 0:
            previous = {
                k: v
                for k, v in self.messages[i - 1].items()
                if k in ("role", "name", "tool_call_id")
            }
            previous["content"] = self._content(self.before_sentinel, self.messages[i - 1])
            earlier, later = self.messages[: i - 1], self.messages[i + 1 :]
            try:
                text = self.render([*earlier, previous, self._replacements(i)[0], *later])
                asked = self.render([*earlier, previous], prompt=True)
            except TemplateError:
                text = asked = ""
            between = text.partition(self.sentinel)[0].rpartition(self.before_sentinel)
            prompted = asked.rpartition(self.before_sentinel)
            if between[1] and prompted[1]:
                return between[2], prompted[2]
        where = before.rfind(self.prompt) if self.prompt else -1
        if where >= 0 and (i == 0 or before.endswith(self.prompt)):
            return before[where:], self.prompt
        return before, before if self.prompt else ""

    def rest_of_prompt(self, before: str) -> str:
        """Return what of the generation prompt a rendering lacks: as a rule, the start of thinking."""
        for length in range(len(self.prompt), 0, -1):
            if before.endswith(self.prompt[:length]):
                return self.prompt[length:]
        return ""

    # --- comparison with other tool calls

    def _by_calls(self, i: int) -> Turn | None:
        """A turn that shows as its tool calls only, by rendering them under another name.

        Where a template counts calls apart from answers, as Mistral's do, no answer can stand in for them.
        """
        turn, earlier = self.messages[i], self.messages[:i]
        if i == 0 or not turn.get("tool_calls"):
            return None
        calls = [_renamed(call, self.sentinel) for call in turn["tool_calls"]]
        renamed = {**turn, "tool_calls": calls}
        previous = {**earlier[-1], "content": self._content(self.before_sentinel, earlier[-1])}
        try:
            other = self.render([*earlier, renamed, *self.messages[i + 1 :]])
            called = self.render([*earlier[:-1], previous, renamed, *self.messages[i + 1 :]])
            answered = self.render([*earlier[:-1], previous, self._replacements(i)[0]])
        except TemplateError:
            return None
        tail = other.rpartition(self.sentinel)[2]
        if other.count(self.sentinel) != len(calls) or not self.text.endswith(tail):
            return None
        headers = [
            text.partition(self.sentinel)[0].rpartition(self.before_sentinel)
            for text in (called, answered)
        ]
        ends = [at + len(c) for c in self.closing if (at := tail.find(c)) >= 0]
        if not ends or not all(mark for _, mark, _ in headers):
            return None
        header, prompted = (text for _, _, text in headers)
        start = other.index(self.sentinel) - len(header) + self._common(header, prompted)
        return Turn(start, len(self.text) - len(tail) + min(ends))

    # --- the last resort

    def _by_difference(self, i: int) -> Turn | None:
        """The last turn where the template rewrites its text: what differs from another text."""
        turn = self._replacements(i)[0]
        try:
            other = self.render([*self.messages[:i], turn, *self.messages[i + 1 :]])
        except TemplateError:
            return None
        start = self._common(self.text, other)
        after = shared_length(self.text[:start:-1], other[:start:-1])
        stop = len(self.text) - after
        following = self.markers.match(self.text, stop)
        if following and following.group() in self.closing:
            stop = following.end()
        return Turn(start, stop) if start < stop else None


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


@dataclass(frozen=True)
class Habits:
    """Text that a template writes around every turn, determined once."""

    prompt: str
    """The generation prompt, empty where the template writes none."""
    closing: frozenset[str]
    """Markers that end an assistant's turn."""
    markers: re.Pattern[str]
    """All control text: the tokenizer's own tokens, and what looks alike."""

    def common(self, one: str, other: str) -> int:
        """Return the length of the common beginning, never within a marker."""
        length = shared_length(one, other)
        for text in (one, other):
            for match in self.markers.finditer(text, max(0, length - 80)):
                if match.start() < length < match.end():
                    length = match.start()
        return length


@lru_cache(maxsize=16)
def habits_of(render: Renderer) -> Habits:
    """Return what a template writes around turns; `render` must be without tools."""
    own = sorted(map(str, render.tokenizer.added_tokens_encoder), key=len, reverse=True)
    markers = re.compile("|".join([*map(re.escape, filter(str.strip, own)), MARKER]))
    bare = Habits("", frozenset(), markers)
    try:
        asked, plain = render([USER], prompt=True), render([USER])
        prompt = asked[bare.common(asked, plain) :]
    except TemplateError:
        prompt = ""
    closing = set()
    try:
        alone = render([USER, ANSWER]).partition(ANSWER["content"])[2]
        if first := markers.match(alone.lstrip()):
            closing.add(first.group())
        longer = render([USER, ANSWER, AGAIN]).partition(ANSWER["content"])[2]
        between = markers.findall(longer.partition(AGAIN["content"])[0])
        if len(between) > 1 and not prompt.lstrip().startswith(between[0]):
            closing.add(between[0])
    except TemplateError:
        pass  # what is known so far is used
    return replace(bare, prompt=prompt, closing=frozenset(closing))
