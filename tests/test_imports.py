"""The house: a room imports only rooms below it, and heavy libraries only where they are used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.spec.averaging import Averaging
from orchestrator.spec.optimizers.base import Optimizer
from orchestrator.spec.schedule import Schedule
from orchestrator.tasks.base import Task
from orchestrator.tasks.preference_losses import PreferenceLoss

PACKAGE = Path(__file__).parent.parent / "orchestrator"
FLOORS = {
    "redaction": -1,
    "errors": 0, "values": 0, "product": 0, "renames": 0, "metric": 0,
    "run_folder": 1, "effects": 1,
    "tasks": 2, "report": 2,
    "spec": 3,
    "model": 4,
    "data": 5,
    "plan": 6,
    "train": 7, "kube": 7,
    "launch": 8, "remote": 8,
    "sweep": 9,
    "top": 10,
}  # fmt: skip
TOP = ("__init__", "__main__", "api", "cli")
HEAVY = {"torch", "ray", "deepspeed", "transformers"}
LIGHT_ROOMS = {
    "redaction",
    "errors",
    "values",
    "product",
    "renames",
    "metric",
    "effects",
    "run_folder",
    "tasks",
    "report",
    "spec",
    "kube",
}
DEEPSPEED_FILES = {"train/engine.py", "train/tensors.py"}


@dataclass(frozen=True)
class Import:
    """One import statement's module, and where it stands."""

    file: str
    line: int
    module: str
    at_import_time: bool


def room_of(module: str) -> str:
    """The room of `orchestrator.…`: its first part; the verbs at the top share one."""
    _, _, rest = module.partition(".")
    first = rest.partition(".")[0] or "__init__"
    return "top" if first in TOP else first


def room_of_file(file: str) -> str:
    """The room of a file, by its path inside the package."""
    return room_of("orchestrator." + file.removesuffix(".py").replace("/", "."))


def imports() -> Iterator[Import]:
    """Every import in the package: at the top, inside functions, for type checkers only."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from imports_of(path)


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in one file."""
    file = path.relative_to(PACKAGE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(n) for node in ast.walk(tree) if _runs_later(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are written in full"
            modules = [node.module or ""]
            if node.module == "orchestrator":
                modules = [f"orchestrator.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(file, node.lineno, module, id(node) not in late)


def _runs_later(node: ast.AST) -> bool:
    """Function bodies, and blocks that only type checkers read."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def test_every_module_has_a_floor() -> None:
    rooms = {room_of_file(p.relative_to(PACKAGE).as_posix()) for p in PACKAGE.rglob("*.py")}
    assert rooms <= set(FLOORS)
    assert {"spec", "tasks", "data", "plan", "model", "train", "launch"} <= rooms


def test_a_room_imports_only_rooms_below_it() -> None:
    upward = []
    for one in imports():
        if one.module.partition(".")[0] != "orchestrator":
            continue
        here = room_of_file(one.file)
        there = room_of(one.module)
        if there != here and FLOORS[there] >= FLOORS[here]:
            upward.append(f"{one.file}:{one.line} ({here}) imports {one.module}")
    assert upward == []


def test_deepspeed_is_imported_in_two_files_only() -> None:
    users = {one.file for one in imports() if one.module.partition(".")[0] == "deepspeed"}
    assert "train/engine.py" in users
    assert users <= DEEPSPEED_FILES


def test_light_rooms_and_the_command_line_import_nothing_heavy_when_loaded() -> None:
    found = [
        f"{one.file}:{one.line} imports {one.module}"
        for one in imports()
        if one.at_import_time
        and one.module.partition(".")[0] in HEAVY
        and (
            room_of_file(one.file) in LIGHT_ROOMS
            or one.file.startswith("cli/")
            or one.file in ("__init__.py", "__main__.py")
        )
    ]
    assert found == []


def test_nobody_outside_the_tasks_asks_for_a_task_by_its_name() -> None:
    asked = [
        f"{path.relative_to(PACKAGE)}: {match}"
        for path in PACKAGE.rglob("*.py")
        for match in re.findall(r"task\.type (?:[!=]=|in) .*", path.read_text(encoding="utf-8"))
    ]
    assert asked == []


def type_comparisons(text: str) -> list[str]:
    """Comparisons of an optimizer's or a schedule's type with a name."""
    return re.findall(r"(?:optimizer|schedule|averaging)\.type (?:[!=]=|in) .*", text)


def test_nobody_outside_their_files_asks_which_kind_a_kind_is() -> None:
    assert type_comparisons('if spec.optimizer.type == "sgd":')
    bases = (Optimizer, Schedule, Averaging, Task, PreferenceLoss)
    kinds = {name for base in bases for name in _names(base)}
    assert kinds >= {"AdamW", "Muon", "PlateauSchedule", "SWA", "SequenceTask", "SimPO"}
    asked = []
    for path in PACKAGE.rglob("*.py"):
        file, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        if file.startswith(("spec/optimizers/", "tasks/", "spec/schedule.py", "spec/averaging.py")):
            continue
        asked += [f"{file}: {found}" for found in type_comparisons(text)]
        asked += [f"{file}: {name}" for name in _tested_classes(ast.parse(text)) & kinds]
    assert asked == []


def _names(base: type) -> set[str]:
    return {base.__name__}.union(*(_names(inner) for inner in base.__subclasses__()))


def _tested_classes(tree: ast.AST) -> set[str]:
    """Names of the classes in `isinstance` and `match`."""
    asks = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    ]
    asks += [node.cls for node in ast.walk(tree) if isinstance(node, ast.MatchClass)]
    return {n.id for ask in asks for n in ast.walk(ask) if isinstance(n, ast.Name)}


def test_the_scan_sees_late_and_type_only_imports() -> None:
    found = {(one.module, one.at_import_time) for one in imports_of(PACKAGE / "tasks" / "base.py")}
    assert ("torch", False) in found, "imports inside functions and under TYPE_CHECKING"
    assert ("orchestrator.errors", True) in found
