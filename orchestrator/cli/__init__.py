"""The command line: each verb is a few lines over a function that Python users call too."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.markup import escape

from orchestrator.cli import cluster, local, sweeps
from orchestrator.cli.options import err
from orchestrator.errors import OrchestratorError

app = typer.Typer(
    help="Fine-tune Hugging Face models on Ray: one YAML says what.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PANELS: dict[str | None, dict[str, Callable[..., None]]] = {
    None: {
        "check": local.check, "plan": local.plan, "prepare": local.prepare, "train": local.train,
        "eval": local.evaluate, "predict": local.predict, "export": local.export, "runs": local.runs,
        "report": local.report, "doctor": local.doctor, "schema": local.schema,
    },
    "Sweeps": {"sweep": sweeps.sweep, "results": sweeps.results},
    "Clusters": {
        "submit": cluster.submit, "jobs": cluster.jobs, "status": cluster.status,
        "logs": cluster.logs, "stop": cluster.stop, "render": cluster.render,
    },
}  # fmt: skip
"""The verbs, as `--help` groups and lists them."""

for panel, verbs in PANELS.items():
    for name, verb in verbs.items():
        app.command(name, rich_help_panel=panel)(verb)


def main() -> None:
    """Run the command line; expected errors end with their message, not with a traceback."""
    try:
        app(standalone_mode=True)
    except OrchestratorError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
