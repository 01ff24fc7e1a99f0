"""Verbs on one job and its run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orchestrator.cli.options import (
    AsJson,
    Job,
    Overrides,
    Resume,
    Run,
    Storage,
    expanded,
    out,
    quiet_libraries,
    say,
)
from orchestrator.cli.sweeps import best_job, show_sweep_plan
from orchestrator.report.terminal import cells, joined, styled
from orchestrator.spec import load_spec

if TYPE_CHECKING:
    from orchestrator.launch.run import Outcome


def check(job: Job, overrides: Overrides = None) -> None:
    """Every problem of a job file at once."""
    spec = load_spec(job, overrides or [])
    what = f" {spec.name}: {spec.task.type}, {spec.tuning.type} tuning"
    out.print(joined(styled("ok", "green"), what), soft_wrap=True)


def plan(
    job: Job,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="Plan for 8xH100x4 (GPUs × type × nodes) or 16cpux2.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Plan for the live cluster behind http://HEAD:8265.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run: each number with its reason. Prepares the data if it is not ready."""
    if cluster and address:
        raise typer.BadParameter("--cluster and --address name two clusters: give one of them")
    spec = load_spec(job, overrides or [])
    quiet_libraries()
    from orchestrator.api import make_plan
    from orchestrator.plan import describe_cluster
    from orchestrator.plan.show import show_plan
    from orchestrator.remote.head import Head

    target = describe_cluster(cluster) if cluster else None
    target = Head(address).cluster() if address else target
    if spec.sweep is not None:
        show_sweep_plan(spec, target, as_json)
        return
    made = make_plan(spec, target)
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        out.print(show_plan(made))


def prepare(job: Job, overrides: Overrides = None) -> None:
    """Tokenize and shard the data, once per fingerprint."""
    spec = load_spec(job, overrides or [])
    quiet_libraries()
    from orchestrator.api import prepare as run

    for split, done in run(spec).items():
        m = done.manifest
        how = "ready" if done.was_ready else "prepared"
        counts = f" {how}: {m.rows:,} rows, {m.tokens:,} tokens, {m.truncated_rows:,} truncated, {m.bad_rows:,} bad"
        out.print(joined(styled(split, "bold"), counts, f" → {done.folder}"), soft_wrap=True)
        if done.teacher is not None:
            how, size = (
                "ready" if done.teacher.was_ready else "asked",
                done.teacher.manifest.size_bytes,
            )
            say(f"  teacher {how}: {size / 2**20:,.1f} MiB → {done.teacher.folder}")
        for warning in m.warnings:
            out.print(styled(f"  {warning}", "yellow"))
        for text, count in m.notes.items():
            out.print(styled(f"  {count:,} rows: {text}", "yellow"))
        for record in m.bad_row_examples:
            out.print(styled(f"  {record.file}, row {record.row}: {record.why}", "yellow"))


def train(
    job: Job,
    overrides: Overrides = None,
    resume: Resume = True,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="JOB is a sweep's name: train its best job, on as many workers as `auto` takes.",
        ),
    ] = False,
    storage_path: Annotated[
        Path | None, typer.Option(help="Folder of all runs. Default: the job's own.")
    ] = None,
) -> None:
    """Run the job; the same command again goes on where it stopped."""
    elsewhere = (
        [f"storage_path={storage_path.absolute() if best else storage_path}"]
        if storage_path
        else []
    )
    wanted = [*elsewhere, *(overrides or [])]
    spec = best_job(job, storage_path or Path("runs"), wanted) if best else load_spec(job, wanted)
    quiet_libraries()
    from orchestrator.api import train as run

    outcome = run(spec, fresh=not resume, console=out)
    out.print(_final_table(outcome))
    if outcome.message:
        say(outcome.message)
    if outcome.status == "stopped":
        raise typer.Exit(130)


def _final_table(outcome: Outcome) -> Table:
    table = Table(
        title=styled(f"{outcome.folder.name}: {outcome.status}"),
        show_header=False,
        title_justify="left",
    )
    metric, best, baseline = outcome.plan.metric, outcome.best, outcome.baseline
    if best:
        held_out = f"{best[metric]:.4f} at step {best['step']} ({best['rows']} held-out rows)"
        table.add_row(*cells(f"best {metric}", held_out))
    if baseline:
        name = f"{baseline['name']}, {baseline['train_rows']:,} rows"
        figure = f"{baseline['metrics'][metric]:.4f} ({name})"
        table.add_row(*cells(f"baseline {metric}", figure))
    if outcome.export:
        table.add_row(*cells("model", outcome.export))
    table.add_row(*cells("report", outcome.report))
    return table


def evaluate(
    run: Run,
    data: Annotated[list[str], typer.Option(help="Files, globs or URLs with the run's columns.")],
    storage_path: Storage = Path("runs"),
    num_workers: Annotated[int | None, typer.Option(help="Default: the run's own number.")] = None,
) -> None:
    """Exact metrics of a run's model on new data, as JSON."""
    quiet_libraries()
    from orchestrator.api import evaluate as measure
    from orchestrator.api import find_run

    print(json.dumps(measure(find_run(run, storage_path), data, num_workers), indent=2))


def predict(run: Run, storage_path: Storage = Path("runs")) -> None:
    """Predictions for standard input, as JSON lines.

    Each line is a text, or, where the task takes several columns, a JSON object with them. The answer to
    a blank line is `null`, so that the n-th answer is that of the n-th line.
    """
    quiet_libraries()
    from orchestrator.api import find_run
    from orchestrator.api import predict as run_model

    lines = [line.rstrip("\n") for line in sys.stdin]
    answers = iter(run_model(find_run(run, storage_path), [line for line in lines if line.strip()]))
    for line in lines:
        print(json.dumps(next(answers) if line.strip() else None, ensure_ascii=False))


def export(
    run: Run,
    target: Annotated[
        Path, typer.Argument(metavar="DIR", help="New folder for the model.", callback=expanded)
    ],
    storage_path: Storage = Path("runs"),
) -> None:
    """A run's best model as a folder that transformers loads, with tokenizer and model card."""
    quiet_libraries()
    from orchestrator.api import export as write
    from orchestrator.api import find_run

    say(str(write(find_run(run, storage_path), target)))


def runs(storage_path: Storage = Path("runs")) -> None:
    """A table of all runs and sweeps."""
    from orchestrator.report.runs import runs_table

    out.print(runs_table(storage_path))


def report(run: Run, storage_path: Storage = Path("runs")) -> None:
    """One self-contained HTML file on a run or a sweep: curves, plan, spec, predicted and measured."""
    from orchestrator.report.runs import write_report_on
    from orchestrator.run_folder import find_either

    say(str(write_report_on(find_either(run, storage_path))))


def doctor(storage_path: Storage = Path("runs")) -> None:
    """Check what this machine or cluster can do; each shortcoming comes with its fix."""
    quiet_libraries()
    from orchestrator.launch.doctor import examine

    styles = {"ok": "green", "note": "yellow", "problem": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    findings = examine(storage_path)
    for finding in findings:
        level = styled(finding.level, styles[finding.level])
        table.add_row(level, *cells(finding.what, finding.found, finding.fix))
    out.print(table)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def schema(
    markdown: Annotated[bool, typer.Option(help="The reference page instead.")] = False,
) -> None:
    """JSON Schema of a job file, for editors."""
    from orchestrator.spec.reference import json_schema, reference_page

    print(reference_page() if markdown else json.dumps(json_schema(), indent=2))
