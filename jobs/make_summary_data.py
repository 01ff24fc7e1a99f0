"""Turn the documentation inside installed Python packages into summaries: the first sentence of a docstring,
to be written from what follows it."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
PACKAGES = ("networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
"""All come with the project itself."""
WORDS = {"source": (15, 80), "target": (4, 20)}
"""Fewest and most words; a longer source is cut."""
HELD_OUT_ROWS = 500
INSTRUCTION_ROWS, INSTRUCTION_WORDS = 2000, 30
"""Of instructions: how many, and words of the text to be summed up, so that few are too long for their job."""


def main() -> None:
    """Write jobs/data/summaries and jobs/data/instructions, {train,eval}.jsonl each.

    Every tenth file is held out, and no summary that a file in training has too.
    """
    splits: dict[str, dict[str, str]] = {"train": {}, "eval": {}}
    for path in source_files():
        held_out = zlib.crc32("/".join(path.parts[-3:]).encode()) % 10 == 0
        for source, summary in summaries(path):
            splits["eval" if held_out else "train"].setdefault(summary, source)
    for summary in splits["train"]:
        splits["eval"].pop(summary, None)
    for split, found in splits.items():
        rows = [{"source": source, "target": summary} for summary, source in sorted(found.items())]
        random.Random(0).shuffle(rows)
        write(
            DATA / "summaries" / f"{split}.jsonl", rows[:HELD_OUT_ROWS] if split == "eval" else rows
        )
        asked = [instruction(row) for row in rows[: INSTRUCTION_ROWS if split == "train" else 100]]
        write(DATA / "instructions" / f"{split}.jsonl", asked)


def instruction(row: dict[str, str]) -> dict[str, str]:
    """A prompt with the beginning of a docstring's body, and its first sentence as the answer."""
    words = row["source"].split()[:INSTRUCTION_WORDS]
    return {
        "prompt": f"Sum up in one sentence.\n\n{' '.join(words)}\n\n",
        "answer": row["target"],
    }


def source_files() -> Iterator[Path]:
    """Python files of the packages, without their tests, in a fixed order."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(spec.submodule_search_locations[0])
        yield from (p for p in sorted(root.rglob("*.py")) if "test" not in str(p.relative_to(root)))


def summaries(path: Path) -> Iterator[tuple[str, str]]:
    """(what a docstring says after its first sentence, that sentence) of a file's functions and classes."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            first, _, rest = text.partition("\n\n")
            summary, words = " ".join(first.split()), plain_words(rest)
            fewest, most = WORDS["target"]
            whole = summary.endswith(".") and summary.count(". ") == 0
            if (
                whole
                and fewest <= len(summary.split()) <= most
                and len(words) >= WORDS["source"][0]
            ):
                yield " ".join(words[: WORDS["source"][1]]), summary


def plain_words(text: str) -> list[str]:
    """Words of a docstring's body, without rulers and the lines of examples."""
    lines = [
        line for line in text.splitlines() if not re.match(r"\s*(>>>|\.\.\.|[-=~]{3,}|\.\. )", line)
    ]
    return " ".join(lines).split()


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
