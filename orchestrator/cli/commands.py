"""The verbs of the command line: each is a few lines over a function that Python users call too."""

from __future__ import annotations

from collections.abc import Callable

import typer

from orchestrator.cli import cluster, local, sweeps

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
