"""A rendered conversation → token ids. What data hold stays data, also where it reads like control text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from orchestrator.tasks.messages import Conversation, Unusable, shared_length
from orchestrator.tasks.spans import Turn
from orchestrator.tasks.tokenizing import control_ids

PRIVATE = range(0xE000, 0xF8FF)
"""Characters without a meaning, one of which frames what stands for control text in data."""
THINKING = re.compile(r"[<\[]/?think", re.IGNORECASE)
"""Tokens around reasoning, which an assistant's own text may hold."""


@dataclass(frozen=True)
class Hidden:
    """Control text that data hold: what stands for it in a rendering, and the text itself."""

    frame: str = ""
    texts: tuple[str, ...] = ()

    def pieces(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """Yield (start, text, whether it is data's control text) of consecutive pieces."""
        position = 0
        if self.texts:
            for match in re.finditer(f"{self.frame}(\\d+){self.frame}", text):
                yield position, text[position : match.start()], False
                yield match.start(), self.texts[int(match.group(1))], True
                position = match.end()
        yield position, text[position:], False


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    special = set(control_ids(tokenizer).values())
    names = sorted((s for s in special if len(s.strip()) > 1), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, names))) if names else None


def mask_control_text(conversation: Conversation, tokenizer: Any) -> tuple[Conversation, Hidden]:
    """Replace the text of special tokens inside messages and tools, so that no data is taken for control.

    Markers of thinking stay in an assistant's text.
    """
    pattern = _control_pattern(tokenizer)
    everything = repr((conversation.messages, conversation.tools))
    if pattern is None or not pattern.search(everything):
        return conversation, Hidden()
    frame = next(
        chr(c) for c in PRIVATE if chr(c) not in everything and repr(chr(c))[1:-1] not in everything
    )
    texts: list[str] = []

    def hide(text: str, keep_thinking: bool) -> str:
        def one(match: re.Match[str]) -> str:
            if keep_thinking and THINKING.match(match.group()):
                return match.group()
            texts.append(match.group())
            return f"{frame}{len(texts) - 1}{frame}"

        return pattern.sub(one, text)

    messages = tuple(
        {
            key: value if key == "role" else _mapped(value, hide, message["role"] == "assistant")
            for key, value in message.items()
        }
        for message in conversation.messages
    )
    tools = tuple(_mapped(tool, hide, False) for tool in conversation.tools)
    return replace(conversation, messages=messages, tools=tools), Hidden(frame, tuple(texts))


def _mapped(value: Any, change: Callable[[str, bool], str], flag: bool) -> Any:
    """Apply `change` to every text in a value."""
    if isinstance(value, str):
        return change(value, flag)
    if isinstance(value, dict):
        return {k: _mapped(v, change, flag) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(v, change, flag) for v in value]
    return value


# --- tokens

Token = tuple[int, int, int]
"""An id and the characters (start, stop) of the text that it covers."""


def tokens_of(
    text: str, turns: Sequence[Turn], hidden: Hidden, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Return token ids of a rendered text, and 1 for each that lies in a turn.

    Text is cut where a token would reach over the beginning of a turn: the prompt has the tokens that
    it has when the model is asked.
    """
    starts = [turn.start for turn in turns]
    edges = sorted({edge for turn in turns for edge in (turn.start, turn.stop)})
    cuts: set[int] = set()
    while True:
        tokens = list(_tokens(text, hidden, sorted(cuts), edges, tokenizer))
        reaching = {
            starts[k]
            for _, start, stop in tokens
            if (k := bisect_right(starts, start)) < len(starts) and starts[k] < stop
        }
        if reaching <= cuts:
            break
        cuts |= reaching
    return [token for token, _, _ in tokens], [_in_turn(t, turns, starts) for t in tokens]


def _in_turn(token: Token, turns: Sequence[Turn], starts: Sequence[int]) -> int:
    # Tokenizers that trim their offsets give a token of spaces an empty span at its end.
    _, start, stop = token
    at = start - 1 if start == stop else start
    k = bisect_right(starts, at) - 1
    return int(k >= 0 and at < turns[k].stop)


def _tokens(
    text: str, hidden: Hidden, cuts: Sequence[int], edges: Sequence[int], tokenizer: Any
) -> Iterator[Token]:
    """Tokens of all pieces, in the text's own positions."""
    for start, piece, as_text in hidden.pieces(text):
        if as_text:
            yield from ((token, start, start + 1) for token in _text_ids(piece, tokenizer))
            continue
        inner = [c for c in cuts if start < c < start + len(piece)]
        for a, b in zip([start, *inner], [*inner, start + len(piece)], strict=True):
            part = piece[a - start : b - start]
            within = [e - a for e in edges if a < e < b]
            for token, begin, end in _encoded(part, a > 0, within, tokenizer):
                yield token, a + begin, a + end


def _encoded(piece: str, inside: bool, edges: Sequence[int], tokenizer: Any) -> Iterator[Token]:
    """Tokens of one piece; one inside the text gets no space in front of it."""
    if not piece:
        return
    before = "\n" if inside else ""
    skipped = _ids(before, tokenizer) if inside else []
    ids = _ids(before + piece, tokenizer)
    if ids[: len(skipped)] != skipped:
        before, skipped, ids = "", [], _ids(piece, tokenizer)
    spans = _positions(before + piece, ids, [e + len(before) for e in edges], tokenizer)
    for token, (begin, end) in list(zip(ids, spans, strict=True))[len(skipped) :]:
        yield token, begin - len(before), end - len(before)


def _text_ids(name: str, tokenizer: Any) -> list[int]:
    """Ids of a control token's name as ordinary text, in two parts where the whole is still control."""
    controls = control_ids(tokenizer)
    for parts in ((name,), (name[:1], name[1:])):
        ids: list[int] = []
        for part in parts:
            skipped = _ids("\n", tokenizer, as_text=True)
            found = _ids("\n" + part, tokenizer, as_text=True)
            is_apart = found[: len(skipped)] == skipped
            ids += found[len(skipped) :] if is_apart else _ids(part, tokenizer, as_text=True)
        if controls.keys().isdisjoint(ids):
            return ids
    raise Unusable(f"the text {name!r} is a control token, whatever surrounds it: remove it")


def _ids(text: str, tokenizer: Any, as_text: bool = False) -> list[int]:
    found = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=as_text)[
        "input_ids"
    ]
    return list(found)


def _positions(
    text: str, ids: Sequence[int], edges: Sequence[int], tokenizer: Any
) -> list[tuple[int, int]]:
    """Characters that each token covers; between edges only, where the tokenizer cannot say more."""
    if tokenizer.is_fast:
        found = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
            split_special_tokens=False,
        )
        return [(int(a), int(b)) for a, b in found["offset_mapping"]]
    spans: list[tuple[int, int]] = []
    begin = 0
    for edge in [*edges, len(text)]:
        count = len(ids) if edge == len(text) else shared_length(ids, _ids(text[:edge], tokenizer))
        spans += [(begin, edge)] * (count - len(spans))
        begin = edge
    return spans
