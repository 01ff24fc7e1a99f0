"""The command line: each verb is a few lines over a function that Python users call too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from orchestrator.launch.run import Outcome
    from orchestrator.plan import Cluster
    from orchestrator.remote.head import Head

app = typer.Typer(
    help="Fine-tune Hugging Face models on Ray: one YAML says what.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]…", help="Fields set on the command line: optimizer.lr=3e-5"
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name, or its folder.", show_default=False)
]
Storage = Annotated[Path, typer.Option(help="Folder of all runs.")]
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
LOCAL_HEAD = "http://127.0.0.1:8265"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; expected errors end with their message, not with a traceback."""
    try:
        app(standalone_mode=True)
    except OrchestratorError as error:
        err.print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _load(job: Path, overrides: list[str] | None) -> JobSpec:
    return load_spec(job, overrides or [])


def _quiet_libraries() -> None:
    """Third-party chatter that tells a user nothing; set before the libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@app.command()
def check(job: Job, overrides: Overrides = None) -> None:
    """Every problem of a job file at once."""
    spec = _load(job, overrides)
    out.print(
        f"[green]ok[/] {spec.name}: {spec.task.type}, {spec.tuning.type} tuning", highlight=False
    )


@app.command()
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
    """What would run: each number with its reason. Prepares the data if it is not ready."""
    spec = _load(job, overrides)
    _quiet_libraries()
    from orchestrator.api import make_plan
    from orchestrator.plan import describe_cluster
    from orchestrator.plan.show import show_plan
    from orchestrator.remote.head import Head

    target = describe_cluster(cluster) if cluster else None
    target = Head(address).cluster() if address else target
    if spec.sweep is not None:
        _plan_sweep(spec, target, as_json)
        return
    made = make_plan(spec, target)
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        out.print(show_plan(made))


def _plan_sweep(spec: JobSpec, target: Cluster | None, as_json: bool) -> None:
    from orchestrator.api import make_sweep_plan
    from orchestrator.run_folder import SweepFolder
    from orchestrator.sweep.show import show_sweep

    made = make_sweep_plan(spec, target)
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        out.print(show_sweep(made, SweepFolder(Path(made.run_dir))))


@app.command()
def prepare(job: Job, overrides: Overrides = None) -> None:
    """Tokenise and shard the data, once per fingerprint."""
    spec = _load(job, overrides)
    _quiet_libraries()
    from orchestrator.api import prepare as run

    for split, done in run(spec).items():
        m = done.manifest
        how = "ready" if done.was_ready else "prepared"
        out.print(
            f"[bold]{split}[/] {how}: {m.rows:,} rows, {m.tokens:,} tokens, {m.truncated_rows:,} truncated, "
            f"{m.bad_rows:,} bad → {done.folder}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if done.teacher is not None:
            how, size = (
                "ready" if done.teacher.was_ready else "asked",
                done.teacher.manifest.size_bytes,
            )
            out.print(
                f"  teacher {how}: {size / 2**20:,.1f} MiB → {done.teacher.folder}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        for record in m.bad_row_examples:
            out.print(
                f"  [yellow]{record.file}, row {record.row}: {_escaped(record.why)}[/]",
                highlight=False,
            )


@app.command()
def train(
    job: Job,
    overrides: Overrides = None,
    resume: Resume = True,
    best: Annotated[
        bool,
        typer.Option("--best", help="JOB is a sweep's name: train its best job, on all workers."),
    ] = False,
    storage: Storage = Path("runs"),
) -> None:
    """Run the job; the same command again goes on where it stopped."""
    spec = _best_job(job, storage, overrides) if best else _load(job, overrides)
    _quiet_libraries()
    from orchestrator.api import train as run

    outcome = run(spec, fresh=not resume, console=out)
    out.print(_final_table(outcome))
    if outcome.message:
        out.print(outcome.message, highlight=False)
    if outcome.status == "stopped":
        raise typer.Exit(130)


def _best_job(sweep: Path, storage: Path, overrides: list[str] | None) -> JobSpec:
    from orchestrator.run_folder import find_sweep

    folder = find_sweep(sweep, storage)
    if not folder.best.exists():
        raise OrchestratorError(f"{folder.root}: no trial has reported anything yet.")
    all_workers = ["resources.num_workers=auto", "resources.cpus_per_worker=auto"]
    return load_spec(folder.best, [*all_workers, *(overrides or [])])


def _final_table(outcome: Outcome) -> Table:
    table = Table(
        title=f"{outcome.folder.name}: {outcome.status}", show_header=False, title_justify="left"
    )
    metric, best, baseline = outcome.plan.metric, outcome.best, outcome.baseline
    if best:
        table.add_row(
            f"best {metric}",
            f"{best[metric]:.4f} at step {best['step']} ({best['rows']} held-out rows)",
        )
    if baseline:
        name = f"{baseline['name']}, {baseline['train_rows']:,} rows"
        table.add_row(f"baseline {metric}", f"{baseline['metrics'][metric]:.4f} ({name})")
    if outcome.export:
        table.add_row("model", str(outcome.export))
    table.add_row("report", str(outcome.report))
    return table


@app.command()
def sweep(job: Job, overrides: Overrides = None, resume: Resume = True) -> None:
    """Run the job's sweep: many trials on warm worker groups; the same command, or its name, goes on."""
    spec = _load(job if job.is_file() else _sweep_job(job), overrides)
    _quiet_libraries()
    from orchestrator.api import sweep as run
    from orchestrator.report.sweep_view import results_table
    from orchestrator.report.trial_log import open_log

    outcome = run(spec, fresh=not resume, console=out)
    out.print(results_table(open_log(outcome.folder), outcome.folder))
    if outcome.message:
        out.print(outcome.message, highlight=False)
    for name, path in (
        ("best job", outcome.folder.best),
        ("model", outcome.export),
        ("report", outcome.report),
    ):
        if path is not None and path.exists():
            out.print(f"{name}: {path}", soft_wrap=True, highlight=False)
    if outcome.status == "stopped":
        raise typer.Exit(130)


def _sweep_job(run: Path) -> Path:
    """The job file that a sweep of this name left in its folder."""
    from orchestrator.run_folder import find_sweep

    return find_sweep(run).spec


@app.command()
def results(run: Run, storage: Storage = Path("runs")) -> None:
    """All trials of a sweep, best first."""
    from orchestrator.report.sweep_view import results_table
    from orchestrator.report.trial_log import open_log
    from orchestrator.run_folder import find_sweep

    folder = find_sweep(run, storage)
    out.print(results_table(open_log(folder), folder))


@app.command(name="eval")
def evaluate(
    run: Run,
    data: Annotated[list[str], typer.Option(help="Files, globs or URLs with the run's columns.")],
    storage: Storage = Path("runs"),
    num_workers: Annotated[int | None, typer.Option(help="Default: the run's own number.")] = None,
) -> None:
    """Exact metrics of a run's model on new data, as JSON."""
    _quiet_libraries()
    from orchestrator.api import evaluate as measure
    from orchestrator.api import find_run

    print(json.dumps(measure(find_run(run, storage), data, num_workers), indent=2))


@app.command()
def predict(run: Run, storage: Storage = Path("runs")) -> None:
    """Predictions for standard input, as JSON lines.

    Each line is a text, or, where the task takes several columns, a JSON object with them.
    """
    _quiet_libraries()
    from orchestrator.api import find_run
    from orchestrator.api import predict as run_model

    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for prediction in run_model(find_run(run, storage), lines):
        print(json.dumps(prediction, ensure_ascii=False))


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the model.")],
    storage: Storage = Path("runs"),
) -> None:
    """A run's best model as a folder that transformers loads, with tokenizer and model card."""
    _quiet_libraries()
    from orchestrator.api import export as write
    from orchestrator.api import find_run

    out.print(str(write(find_run(run, storage), target)), soft_wrap=True)


@app.command()
def submit(
    job: Job,
    overrides: Overrides = None,
    address: Address = LOCAL_HEAD,
    name: Annotated[
        str | None,
        typer.Option(help="The submission's id. Default: the run's name and six digits."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the output and exit as the job does.")] = True,
) -> None:
    """Train on a cluster: pack the working directory, submit `train`, follow it to its end."""
    spec = load_spec(job, overrides or [], files="packed")
    _quiet_libraries()
    from orchestrator.remote import jobs
    from orchestrator.remote.head import Head

    head = Head(address)
    request = jobs.submit(spec, job, overrides or [], head, name, _say)
    _say(f"submitted {request.submission_id}: {request.entrypoint}")
    if wait:
        _follow(head, request.submission_id)


def _follow(head: Head, submission_id: str) -> None:
    from orchestrator.remote import jobs

    try:
        info = jobs.follow(head, submission_id, _write)
    except KeyboardInterrupt:
        _say(f"no longer following; the job goes on. orchestrator stop {submission_id} ends it")
        raise
    _say(f"{submission_id}: {info.status.value}")
    raise typer.Exit(jobs.exit_code(info))


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def jobs(address: Address = LOCAL_HEAD) -> None:
    """A table of the cluster's jobs."""
    from orchestrator.remote.head import Head
    from orchestrator.remote.show import jobs_table

    out.print(jobs_table(Head(address).list()))


@app.command()
def status(submission_id: JobId, address: Address = LOCAL_HEAD, as_json: AsJson = False) -> None:
    """How a job on a cluster stands."""
    from orchestrator.remote.head import Head
    from orchestrator.remote.show import job_facts, job_table

    info = Head(address).job(submission_id)
    if as_json:
        print(json.dumps(job_facts(info), indent=2))
    else:
        out.print(job_table(info))


@app.command()
def logs(
    submission_id: JobId,
    address: Address = LOCAL_HEAD,
    wait: Annotated[
        bool,
        typer.Option("--follow/--no-follow", "-f", help="Go on to the job's end; exit as it does."),
    ] = False,
) -> None:
    """What a job on a cluster printed."""
    from orchestrator.remote.head import Head

    head = Head(address)
    head.job(submission_id)
    if wait:
        _follow(head, submission_id)
    _write(head.logs(submission_id))


@app.command()
def stop(submission_id: JobId, address: Address = LOCAL_HEAD) -> None:
    """Ask a job on a cluster to commit a checkpoint and leave."""
    from orchestrator.remote import jobs
    from orchestrator.remote.head import Head

    _say(f"{submission_id}: {jobs.stop(Head(address), submission_id, _say)}")


@app.command()
def runs(storage: Storage = Path("runs")) -> None:
    """A table of all runs and sweeps."""
    from orchestrator.report.runs import runs_table

    out.print(runs_table(storage))


@app.command()
def report(run: Run, storage: Storage = Path("runs")) -> None:
    """One self-contained HTML file on a run or a sweep: curves, plan, spec, predicted and measured."""
    from orchestrator.report.runs import write_report_on
    from orchestrator.run_folder import find_either

    out.print(str(write_report_on(find_either(run, storage))), soft_wrap=True)


@app.command()
def doctor(storage: Storage = Path("runs")) -> None:
    """What this machine or cluster can do, each shortcoming with its fix."""
    _quiet_libraries()
    from orchestrator.launch.doctor import examine

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    findings = examine(storage)
    for finding in findings:
        table.add_row(marks[finding.level], finding.what, finding.found, finding.fix)
    out.print(table)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option(help="The reference page instead.")] = False,
) -> None:
    """JSON Schema of a job file, for editors."""
    from orchestrator.spec.reference import json_schema, reference_page

    print(reference_page() if markdown else json.dumps(json_schema(), indent=2))


@app.command()
def render(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", show_default=False)] = None,
    overrides: Overrides = None,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="For KubeRay: the only kind.")] = True,
    cluster_only: Annotated[
        bool, typer.Option("--cluster-only", help="A RayCluster that takes jobs.")
    ] = False,
    cluster: Annotated[str | None, typer.Option(help="Machines: 8xH100x4, 16cpux2.")] = None,
    kueue: Annotated[str | None, typer.Option(metavar="QUEUE", help="Queue in Kueue.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Workers on spot machines.")] = False,
    gcs_ft: Annotated[
        str | None, typer.Option(metavar="redis://HOST:PORT", help="Survive a lost head.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As [key=value].")
    ] = None,
    validate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check manifests instead of writing them.")
    ] = None,
    crds: Annotated[
        Path | None, typer.Option(help="With --validate: a cluster's own CRDs, file or folder.")
    ] = None,
) -> None:
    """Manifests for Kubernetes, sized as the plan sizes the job; or a check of manifests."""
    from orchestrator.kube.command import check_file, manifests

    if validate is not None:
        for line in check_file(validate, crds):
            out.print(line, highlight=False, soft_wrap=True)
        return
    flags = {
        "kubernetes.cluster": cluster, "kubernetes.kueue.queue": kueue,
        "kubernetes.worker.spot": "true" if spot else None,
        "kubernetes.gcs_fault_tolerance.redis": gcs_ft,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    print(manifests(job, [*(overrides or []), *(set_ or []), *given], cluster_only), end="")
