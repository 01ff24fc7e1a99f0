"""What the tests of compatibility share."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-page", action="store_true", help="write docs/compatibility.md (make compat)"
    )


@pytest.fixture(scope="session")
def compat_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which models are built, each once."""
    return tmp_path_factory.mktemp("compat-models")
