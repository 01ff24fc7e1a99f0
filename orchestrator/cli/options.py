"""Arguments and output shared by the commands."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from orchestrator.report.terminal import Terminal

LOG_WIDTH = 160
"""Columns of tables in a file or a pipe, where nobody knows how wide the reader's screen is."""


def _width(stream: TextIO | None) -> int | None:
    """None: as wide as the terminal, or as COLUMNS says."""
    if "COLUMNS" in os.environ or (stream is not None and stream.isatty()):
        return None
    return LOG_WIDTH


def expanded(path: Path) -> Path:
    """Return a path with `~` expanded: shells leave it alone in `--storage-path=~/runs`."""
    return Path(os.path.expanduser(path))


out = Terminal(width=_width(sys.stdout))
err = Terminal(stderr=True, width=_width(sys.stderr))
Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]…", help="Fields set on the command line: optimizer.lr=3e-5"
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name, or its folder.",
        show_default=False,
        callback=os.path.expanduser,
    ),
]
Storage = Annotated[Path, typer.Option(help="Folder of all runs.", callback=expanded)]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--fresh",
        help="Go on where a run of this name stopped, or start over (the old folder is kept aside).",
    ),
]
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The head's Jobs API, http://HEAD:8265."),
]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="As `submit` printed it.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def quiet_libraries() -> None:
    """Third-party chatter that tells a user nothing; set before the libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # DeepSpeed warns on standard output, where verbs print JSON, and has no setting for it.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def say(text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    out.print(text, soft_wrap=True)
