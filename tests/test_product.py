"""The product's name on package indexes: one constant, which every hint and the metadata agree with."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import orchestrator
from orchestrator.product import DISTRIBUTION, VERSION, install_hint

ROOT = Path(__file__).parent.parent
TEXTS = ("*.py", "*.md", "*.yaml", "*.toml", "Dockerfile*", "Makefile")


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_metadata_and_code_agree_on_name_and_version() -> None:
    assert f'name = "{DISTRIBUTION}"' in project()
    assert orchestrator.__version__ == VERSION
    assert 'version = { attr = "orchestrator.product.VERSION" }' in project()
    assert DISTRIBUTION != "orchestrator", "PyPI has another project of that name"


def test_the_version_can_be_read_without_importing_the_package() -> None:
    tree = ast.parse((ROOT / "orchestrator" / "product.py").read_text(encoding="utf-8"))
    values = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    assert values["VERSION"] == VERSION


@pytest.mark.parametrize("extra", ["mlflow", "qlora", "kubernetes", "gpu", "demo", "dev", "timm"])
def test_a_hint_names_an_extra_that_exists(extra: str) -> None:
    assert re.search(rf"^{extra} = \[", project(), re.M)
    assert install_hint(extra) == f"pip install '{DISTRIBUTION}[{extra}]'"


def test_no_text_tells_users_to_install_a_stranger_s_package() -> None:
    folders = [ROOT / name for name in ("orchestrator", "docs", "cluster", "jobs", "tests")]
    files = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    files += [path for folder in folders for kind in TEXTS for path in folder.rglob(kind)]
    stranger = re.compile(r"(?<![-\w])orchestrator(\[|==)[a-z0-9]")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in stranger.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    extras = {
        call.args[0].value
        for path in (ROOT / "orchestrator").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "install_hint"
        and isinstance(call.args[0], ast.Constant)
    }
    assert {"mlflow", "qlora", "timm"} <= extras
    assert all(re.search(rf"^{extra} = \[", project(), re.M) for extra in extras)


def test_importing_the_command_line_imports_nothing_that_takes_time() -> None:
    """What is imported before `main` runs is where Ctrl-C would end in a traceback."""
    import subprocess

    code = "import sys, orchestrator.cli; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"typer", "rich", "pydantic", "yaml", "torch", "ray", "transformers"}
