"""Every cell of the table does what the table says, and so does the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compat import models
from compat.page import PAGE, render
from compat.run import Outcome, one_process, run
from compat.table import CELLS, Cell

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """By name of cell, filled by the tests."""
    return {}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_works_or_is_refused_as_the_table_says(
    cell: Cell, compat_models: Path, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    outcomes[cell.name] = Outcome(cell, failure="see the test")
    try:
        outcomes[cell.name] = run(cell, models.build(cell.architecture, compat_models), tmp_path)
    except Exception as error:
        outcomes[cell.name] = Outcome(cell, failure=f"{type(error).__name__}: {error}"[:200])
        raise
    assert bool(outcomes[cell.name].reason) == cell.refused, outcomes[cell.name].reason


def test_the_page_says_what_the_cells_do(
    outcomes: dict[str, Outcome], request: pytest.FixtureRequest
) -> None:
    if len(outcomes) < len(CELLS):
        pytest.skip("not all cells were run")
    page = render(outcomes.values())
    if request.config.getoption("--write-page", default=False):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "run `make compat` and commit the page"


def test_cells_have_names_of_their_own() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
