"""Whose run folder is it: start, continue or refuse, and never two drivers at once."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, RunExistsError
from orchestrator.plan.plan import Plan, at_workers
from orchestrator.run_folder import RunFolder, lock_of, read_json, write_atomically, write_json
from orchestrator.spec import dump_spec

MAY_CHANGE = (
    "name", "storage", "runtime", "tracking", "checkpoint", "faults", "evaluation", "stop.max_time_s",
    "data.prepared_dir", "distillation.teacher_rows", "distillation.compare_rows", "resources.cpus_per_worker",
    "resources.num_workers",
)  # fmt: skip
"""Fields that do not touch the mathematics: a run may be continued with other values."""
MUST_MATCH = ("stage", "bf16", "global_rows", "total_steps", "labels")
"""Derived figures that a checkpoint depends on. The same number of workers must also keep `micro_rows`:
it then goes on bit-identically; another number adds up in another order anyway."""


def at_saved_stage(plan: Plan) -> Plan:
    """The plan, at the ZeRO stage of the run's checkpoints where the job leaves it to `auto`.

    Another number of workers may fit a lower stage; checkpoints are bound to the one they have.
    """
    old = read_json(RunFolder(Path(plan.run_dir)).plan)
    if old is None or plan.spec.zero.stage != "auto" or old.get("stage") in (None, plan.stage):
        return plan
    kept = at_workers(plan, plan.num_workers, old["stage"])
    return kept.model_copy(
        update={"reasons": {**kept.reasons, "stage": "the run's checkpoints are of this stage"}}
    )


@contextmanager
def claimed(plan: Plan, fresh: bool) -> Iterator[RunFolder]:
    """The run folder, ready for a launch, locked against a second driver.

    Raises RunExistsError where another process trains this run, or where its checkpoints belong to a
    job that differs in more than MAY_CHANGE.
    """
    folder = RunFolder(Path(plan.run_dir))
    with claimed_folder(folder.root, fresh):
        if folder.plan.exists():
            _must_fit(folder, plan)
        write_atomically(folder.spec, dump_spec(plan.spec))
        write_json(folder.plan, plan.model_dump(mode="json"))
        for request in (folder.stop_request, folder.handover_request):
            request.unlink(missing_ok=True)
        yield folder


@contextmanager
def claimed_folder(root: Path, fresh: bool) -> Iterator[None]:
    """A writable folder that no other process works in; with `fresh`, an empty one.

    Raises RunExistsError where another process has it, OrchestratorError where it cannot be written.
    """
    _make_writable(root)
    with _locked(root):
        if fresh:
            _put_aside(root)
            _make_writable(root)
        yield


def _make_writable(root: Path) -> None:
    """Find out now, not at the first checkpoint."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root).reserve.write_bytes(bytes(2**20))
    except OSError as error:
        raise OrchestratorError(
            f"{root} cannot be written: {error.strerror}. "
            "Mend its permissions or free space, or set storage=… to another folder."
        ) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """The lock dies with its process, so a killed driver leaves nothing to clean up."""
    with open(lock_of(root), "w", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunExistsError(
                f"{root}: another process is training this run. Wait for it, stop it, or use name=…"
            ) from error
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _put_aside(root: Path) -> None:
    """`--fresh` never overwrites: what was there moves to a dated folder beside it."""
    if any(path.name != RunFolder(root).reserve.name for path in root.iterdir()):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        root.rename(root.with_name(f"{root.name}.before-{stamp}"))


def _must_fit(folder: RunFolder, plan: Plan) -> None:
    old: dict[str, Any] = read_json(folder.plan)
    new = plan.model_dump(mode="json")
    changed = [
        f"{name}: {_at(old['spec'], name)!r} → {_at(new['spec'], name)!r}"
        for name in differences(old["spec"], new["spec"])
    ]
    same_size = old.get("num_workers") == new["num_workers"]
    must_match = (*MUST_MATCH, "micro_rows") if same_size else MUST_MATCH
    changed += [f"{k}: {old[k]!r} → {new[k]!r}" for k in must_match if old.get(k) != new[k]]
    for name, what in (("folder", "the training data"), ("teacher_folder", "the teacher")):
        before, now = (Path(one["train_data"].get(name) or "").name for one in (old, new))
        if before != now:
            changed.append(f"the content of {what}")
    if changed:
        raise another_job(folder.root, changed)


def another_job(root: Path, changed: list[str]) -> RunExistsError:
    """The error that names every difference between a run and the job that claims its name."""
    return RunExistsError(
        f"{root} holds a run of another job; it differs in:\n  "
        + "\n  ".join(changed)
        + "\nUse another name=…, put the old values back, or start over with --fresh (keeps the old folder)."
    )


def differences(
    old: Any, new: Any, may_change: tuple[str, ...] = MAY_CHANGE, path: str = ""
) -> list[str]:
    """Dotted paths at which two specs differ, without those that may change."""
    if path in may_change:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            d
            for k in keys
            for d in differences(old.get(k), new.get(k), may_change, f"{path}.{k}".lstrip("."))
        ]
    return [] if old == new else [path]


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
