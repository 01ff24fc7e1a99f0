"""`orchestrator render`: a job file in, YAML out; or a file of manifests in, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.kube.render import render
from orchestrator.kube.schema import read_crds
from orchestrator.kube.sizing import size_of
from orchestrator.kube.text import dump_documents
from orchestrator.kube.validate import validate
from orchestrator.spec import load_spec


def manifests(job: Path | None, overrides: Sequence[str], cluster_only: bool = False) -> str:
    """YAML for `kubectl apply`, with the reasons for its sizes as comments. The job's local paths are the
    cluster's, so they are not looked for here.

    Raises SpecError, PlanError.
    """
    if job is None:
        raise OrchestratorError("render needs a job file, or --validate FILE.")
    spec = load_spec(job, overrides, files="there")
    documents = render(spec, cluster_only)
    why = "".join(f"# {what}: {reason}\n" for what, reason in size_of(spec).reasons.items())
    return why + dump_documents(documents)


def check_file(path: Path, crds: Path | None) -> Iterator[str]:
    """Lines that say what was checked and what was not. Raises SpecError with all problems."""
    checked = validate(path, read_crds(crds) if crds else None)
    counts = ", ".join(f"{count} {kind}" for kind, count in checked.kinds.items())
    yield f"ok {path}: {counts}"
    for reason in checked.unchecked:
        yield f"note {reason}"
