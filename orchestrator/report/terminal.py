"""Text on the terminal: ours may be styled, everything else is printed literally.

Paths, names, labels and error texts come from users and libraries. They may hold Rich markup (`[bold]`), terminal
escapes, or characters that the terminal cannot show. No module passes markup to a console; styled text is built with
`styled`, table cells with `cells`, and `Terminal` cleans whatever reaches it in another way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed; ESC begins a terminal sequence
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029"  # change the direction or the line
    "\ud800-\udfff]"  # lone surrogates: bytes of a file name that are not UTF-8
)
ASCII = {
    "→": ">", "…": "~", "×": "x", "–": "-", "—": "-", "·": ".", "⇄": "=", "≥": ">", "≤": "<", "±": "~",
    "▁": "_", "▂": "_", "▃": ".", "▄": ".", "▅": ":", "▆": ":", "▇": "#", "█": "#", "┤": "|", "└": "+", "─": "-",
}  # fmt: skip
"""Characters of our own texts, each with one that every terminal shows and that is as wide."""


def visible(text: str) -> str:
    """Return `text` with control characters written as escapes: `\\x1b` for ESC."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def styled(text: object, style: str = "") -> Text:
    """Return `text` for a console, literally, in a Rich style such as `bold red`."""
    return Text(visible(str(text)), style=style)


def joined(*parts: str | Text) -> Text:
    """Return one text made of literal strings and styled texts."""
    return Text().join(part if isinstance(part, Text) else styled(part) for part in parts)


def cells(*values: object) -> list[Text]:
    """Return the cells of a table row; styles are left to the columns."""
    return [styled(value) for value in values]


class Terminal(Console):
    """A console that interprets nothing it is given and survives a closed output.

    Strings are printed without markup, emoji codes or highlighting. Characters that the output's encoding lacks are
    replaced. Where the reader of a pipe leaves, further output is dropped and the verb goes on: a run must not end
    because `head` has seen enough.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return `text` as it is printed, before it is measured and wrapped."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of a renderable, with texts that this terminal can show."""
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield segment._replace(text=encodable(visible(segment.text), self.encoding))

    def on_broken_pipe(self) -> None:
        """Drop what is printed from now on."""
        self.quiet = True
        discard(self.file.fileno())


def discard(descriptor: int) -> None:
    """Send what is written to an open file descriptor to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def encodable(text: str, encoding: str) -> str:
    """Return `text` with each character that `encoding` lacks replaced."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        replaced = "".join(ASCII.get(character, character) for character in text)
        return replaced.encode(encoding, "backslashreplace").decode(encoding)
    return text
