"""What reaches the terminal: users' text literally, whatever the terminal is."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from orchestrator.plan.show import table as plan_table
from orchestrator.report.progress import ProgressView
from orchestrator.report.records import append_event
from orchestrator.report.terminal import UNSAFE, Terminal, cells, joined, styled, visible
from orchestrator.run_folder import RunFolder

PACKAGE = Path(__file__).parent.parent / "orchestrator"
HOSTILE = (
    "[bold]loud[/bold]", "[/]", "[/bold]", "[link=http://evil.example]here[/link]", "[red", "a[0]", ":smile:",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "back\x08space", "\r over", "\x9b31m", "\u202eabc",
)  # fmt: skip


def printed(*things: Any, encoding: str = "utf-8", width: int = 100) -> str:
    """Return what a terminal of an encoding is sent."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Terminal(file=file, force_terminal=True, color_system=None, width=width)
    for thing in things:
        console.print(thing)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_is_printed_literally_everywhere(text: str) -> None:
    rows = Table(title=text)
    rows.add_column(text)
    rows.add_row(text)
    shown = printed(text, styled(text, "bold"), joined("a ", text), rows)
    assert shown.count(visible(text)) == 6
    assert not UNSAFE.search(shown)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_plain_console_of_a_python_user_interprets_nothing_either(
    text: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    shown = io.StringIO()
    view = ProgressView(folder, 10, "loss", Console(file=shown, width=400))
    append_event(folder.events, "warning", text=text)
    append_event(folder.events, "commit", folder=text)
    view.update()
    view.say(text)
    Console(file=shown, width=400).print(plan_table(text, iter([(text, text, text)])))
    assert shown.getvalue().count(visible(text)) >= 6
    assert not UNSAFE.search(shown.getvalue())


@given(st.text())
def test_any_text_is_printed(text: str) -> None:
    rows = Table()
    rows.add_row(*cells(text, text))
    for encoding in ("utf-8", "ascii", "latin-1"):
        assert not UNSAFE.search(printed(text, rows, encoding=encoding, width=20))


@given(st.text())
def test_visible_text_is_safe_and_safe_text_is_left_alone(text: str) -> None:
    assert not UNSAFE.search(visible(text))
    assert visible(visible(text)) == visible(text)
    if not UNSAFE.search(text):
        assert visible(text) == text


def test_an_ascii_terminal_gets_ascii() -> None:
    rows = Table(title="2 × 3 → …")
    rows.add_row("▁▂▃▄▅▆▇█ ┤└─")
    shown = printed(rows, encoding="ascii")
    assert "2 x 3 > ~" in shown
    assert "\\u" not in shown


def test_a_reader_who_leaves_does_not_end_the_verb() -> None:
    import os

    reader, writer = os.pipe()
    file = os.fdopen(writer, "w")
    console = Terminal(file=file)
    os.close(reader)
    console.print("nobody reads this")
    assert console.quiet
    console.print("nor this")
    file.close()


def test_no_module_writes_markup() -> None:
    """Markup in a string is the way by which a user's text gets interpreted."""
    tags = re.compile(
        r"\[/\]|\[/?(bold|dim|italic|red|green|yellow|cyan|blue|magenta|link)\b[^\]]*\]"
    )
    found = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for match in tags.finditer(path.read_text(encoding="utf-8"))
        if path.name != "terminal.py"
    ]
    assert found == []
