"""Commands for clusters: submit, watch and stop a job, and render manifests for Kubernetes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import (
    Address,
    AsJson,
    Job,
    JobId,
    Overrides,
    out,
    quiet_libraries,
    say,
)
from orchestrator.spec import load_spec

if TYPE_CHECKING:
    from orchestrator.remote.head import Head

LOCAL_HEAD = "http://127.0.0.1:8265"


def submit(
    job: Job,
    overrides: Overrides = None,
    address: Address = LOCAL_HEAD,
    name: Annotated[
        str | None,
        typer.Option(help="The submission id. Default: the run's name and six digits."),
    ] = None,
    wait: Annotated[
        bool, typer.Option(help="Stream the logs and return the job's exit code.")
    ] = True,
) -> None:
    """Train on a cluster: upload the working directory, submit the job and stream its logs."""
    spec = load_spec(job, overrides or [], files="packed")
    quiet_libraries()
    from orchestrator.remote import jobs
    from orchestrator.remote.head import Head

    head = Head(address)
    request = jobs.submit(spec, job, overrides or [], head, name, say)
    say(f"submitted {request.submission_id}: {request.entrypoint}")
    if wait:
        _follow(head, request.submission_id)


def _follow(head: Head, submission_id: str) -> None:
    from orchestrator.remote import jobs

    try:
        info = jobs.follow(head, submission_id, _write)
    except KeyboardInterrupt:
        say(
            f"stopped following; the job keeps running. To stop it: orchestrator stop {submission_id}"
        )
        raise
    say(f"{submission_id}: {info.status.value}")
    raise typer.Exit(jobs.exit_code(info))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def jobs(address: Address = LOCAL_HEAD) -> None:
    """List the cluster's jobs."""
    from orchestrator.remote.head import Head
    from orchestrator.remote.show import jobs_table

    out.print(jobs_table(Head(address).list()))


def status(submission_id: JobId, address: Address = LOCAL_HEAD, as_json: AsJson = False) -> None:
    """Show the state of a job on a cluster."""
    from orchestrator.remote.head import Head
    from orchestrator.remote.show import job_info, job_table

    info = Head(address).job(submission_id)
    if as_json:
        print(json.dumps(job_info(info), indent=2))
    else:
        out.print(job_table(info))


def logs(
    submission_id: JobId,
    address: Address = LOCAL_HEAD,
    wait: Annotated[
        bool,
        typer.Option(
            "--follow/--no-follow", "-f", help="Follow to the job's end and return its exit code."
        ),
    ] = False,
) -> None:
    """Print the logs of a job on a cluster."""
    from orchestrator.remote.head import Head

    head = Head(address)
    head.job(submission_id)
    if wait:
        _follow(head, submission_id)
    _write(head.logs(submission_id))


def stop(submission_id: JobId, address: Address = LOCAL_HEAD) -> None:
    """Stop a job on a cluster after it has committed a checkpoint."""
    from orchestrator.remote import jobs
    from orchestrator.remote.head import Head

    say(f"{submission_id}: {jobs.stop(Head(address), submission_id, say)}")


def render(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", show_default=False)] = None,
    overrides: Overrides = None,
    cluster_only: Annotated[
        bool, typer.Option("--cluster-only", help="Write a RayCluster that takes jobs.")
    ] = False,
    cluster: Annotated[str | None, typer.Option(help="The machines: 8xH100x4, 16cpux2.")] = None,
    kueue: Annotated[
        str | None, typer.Option(metavar="QUEUE", help="Queue the job in Kueue.")
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Run workers on spot machines.")] = False,
    gcs_ft: Annotated[
        str | None,
        typer.Option(
            metavar="redis://HOST:PORT",
            help="Survive a lost head: keep Ray's state in this Redis, and the driver in its own pod.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As \\[key=value].")
    ] = None,
) -> None:
    """Write a job's manifests for KubeRay, with the worker sizes of the plan.

    Check them against your cluster with kubectl apply --dry-run=server -f FILE.
    """
    from orchestrator.kube.render import render_yaml

    flags = {
        "kubernetes.cluster": cluster, "kubernetes.kueue.queue": kueue,
        "kubernetes.worker.spot": "true" if spot else None,
        "kubernetes.gcs_fault_tolerance.redis": gcs_ft,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    print(render_yaml(job, [*(overrides or []), *(set_ or []), *given], cluster_only), end="")
