"""`docs/compatibility.md`: the table's outcomes as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from compat.run import Outcome
from compat.table import TUNINGS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
INTRODUCTION = """# Compatibility

<!-- Written by `make compat`. Do not edit. -->

Each cell below is a test.
A tiny model of the architecture is built from its config, with the kind of tokenizer or processor of its checkpoints.
Then the product prepares rows, plans, trains a few steps, evaluates, exports and predicts.

*works* means that all of this holds:

- Training finishes. Weights that the checkpoint lacks, such as a new head, are trained.
- A row's result is the same alone and in a padded batch beside other rows.
- Documents have the same loss packed into one sequence and apart.
- The export loads in plain `transformers` without missing or unexpected weights. Tied weights stay tied.
- Plain `transformers`, in padded batches, gives the same predictions as `orchestrator predict`.

*refused* means that `orchestrator plan` ends with the sentence below the table. An empty cell is not tested.

`make compat` runs all cells and writes this page.
CI does the same, and fails where the page changes.
"""


def render(outcomes: Iterable[Outcome]) -> str:
    """The page for these outcomes, in the order of the table."""
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.cell.task, []).append(outcome)
    parts = [INTRODUCTION, f"Tested with transformers {version('transformers')}.\n"]
    for task, found in by_task.items():
        parts.append(_section(task, found))
    return "\n".join(parts)


def _section(task: str, outcomes: Sequence[Outcome]) -> str:
    tunings = [name for name in TUNINGS if any(o.cell.tuning == name for o in outcomes)]
    architectures = {o.cell.architecture.name: o.cell.architecture for o in outcomes}
    by_cell = {(o.cell.architecture.name, o.cell.tuning): _word(o) for o in outcomes}
    lines = [
        f"## {task[0].upper()}{task[1:]}",
        "",
        f"| architecture | `model_type` | {' | '.join(tunings)} |",
        "|---" * (2 + len(tunings)) + "|",
    ]
    for name, one in architectures.items():
        words = [by_cell.get((name, tuning), "") for tuning in tunings]
        lines.append(f"| {name} | `{one.model_type}` | {' | '.join(words)} |")
    reasons = [
        f"- {o.cell.architecture.name}, {o.cell.tuning}: {o.reason}" for o in outcomes if o.reason
    ]
    return "\n".join([*lines, *(["", *reasons] if reasons else []), ""])


def _word(outcome: Outcome) -> str:
    if outcome.failure:
        return "**fails**"
    return "refused" if outcome.reason else "works"
