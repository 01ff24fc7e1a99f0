"""The code keeps the rules of style that can be counted. `python tests/test_style.py` prints the figures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "orchestrator"
LONGEST_FUNCTION = 80
LONGEST_FILE = 400
QUESTIONS = re.compile(r"(What|Where|Whether|How|When|Which|Who|Whose)\b")
MOST_QUESTIONS = 0.05
"""Share of docstrings that may open with a question word instead of saying what the thing is or does."""
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


@dataclass(frozen=True)
class Module:
    """A source file of the package."""

    name: str
    text: str

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text))


def modules() -> list[Module]:
    """Return all source files of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [Module(str(f.relative_to(PACKAGE)), f.read_text(encoding="utf-8")) for f in files]


def functions() -> Iterator[tuple[str, int]]:
    """Yield (file:name, lines) of each function."""
    for module in modules():
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module.name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (file:name, docstring) of all that has one."""
    for module in modules():
        for node in module.nodes:
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                yield f"{module.name}:{getattr(node, 'name', 'module')}", text


def questions() -> list[str]:
    """Return the docstrings that open with a question word."""
    return [f"{name}: {text}" for name, text in docstrings() if QUESTIONS.match(text)]


def test_functions_are_short() -> None:
    assert [f for f in functions() if f[1] > LONGEST_FUNCTION] == []


def test_files_are_short() -> None:
    assert [(m.name, m.lines) for m in modules() if m.lines > LONGEST_FILE] == []


def test_docstrings_say_what_a_thing_is() -> None:
    found = questions()
    assert len(found) <= MOST_QUESTIONS * len(list(docstrings())), found


def main() -> None:
    """Print the figures."""
    sizes = sorted(m.lines for m in modules())
    lengths = sorted(length for _, length in functions())
    print(f"{len(sizes)} files, median {sizes[len(sizes) // 2]} lines, longest {sizes[-1]}")
    print(
        f"{len(lengths)} functions, median {lengths[len(lengths) // 2]} lines, longest {lengths[-1]}"
    )
    print(f"{len(questions())} of {len(list(docstrings()))} docstrings open with a question word")


if __name__ == "__main__":
    main()


BRITISH = (
    "behaviour", "colour", "favour", "neighbour", "labell", "learnt", "modelling", "centred", "summaris",
    "optimis", "regularis", "normalis", "tokenis", "quantis", "initialis", "minimis", "maximis", "serialis",
    "generalis", "recognis", "organis", "utilis", "visualis", "specialis", "synchronis", "catalogue", "artefact",
)  # fmt: skip
OLD_NAMES = {
    "orchestrator/renames.py",
    "tests/test_stored_runs.py",
    "tests/test_spec.py",
    "tests/test_style.py",
}
"""Files that hold job fields as they were spelled once."""


def test_the_tree_is_spelled_as_the_libraries_spell() -> None:
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".j2", ".json", ".sh"}
    found = []
    for folder in ("orchestrator", "tests", "docs", "jobs", "cluster", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix not in suffixes or name in OLD_NAMES or "/data/" in name:
                continue
            text = path.read_text(encoding="utf-8").lower()
            found += [f"{name}: {word}" for word in BRITISH if word in text]
    found += [f"README.md: {word}" for word in BRITISH if word in (ROOT / "README.md").read_text()]
    assert found == []


PRIVATE = {
    "director", "referee", "fleet", "journal", "verdict", "verdicts", "knob", "knobs", "meanings", "adrift", "hopeless",
    "heed", "handback", "lighttrial", "orphaned", "orphans", "patiently",
}  # fmt: skip
"""Words that the field has other terms for; the left column of the project's list of terms, as far as it is done."""


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module defines or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def test_names_are_the_terms_of_the_field() -> None:
    assert set(identifiers(ast.parse("class A:\n def knob(self, heed): return self.fleet"))) >= {
        "knob", "heed", "fleet",
    }  # fmt: skip
    found = []
    for module in modules():
        names = {*identifiers(ast.parse(module.text)), *Path(module.name).with_suffix("").parts}
        words = {word for name in names for word in [*name.lower().split("_"), name.lower()]}
        found += [f"{module.name}: {word}" for word in sorted(words & PRIVATE)]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        if "decisions" not in page.parts:
            words = set(re.findall(r"[a-z]+", page.read_text(encoding="utf-8").lower()))
            found += [f"{page.name}: {word}" for word in sorted(words & PRIVATE)]
    assert found == []
