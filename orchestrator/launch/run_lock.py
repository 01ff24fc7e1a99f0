"""Run lock: start, resume or refuse a run folder, never with two drivers at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.effects import decided_by, may_change_on_resume
from orchestrator.errors import OrchestratorError, RunExistsError
from orchestrator.model.identity import ModelIdentity
from orchestrator.plan.plan import Plan, at_workers
from orchestrator.run_folder import (
    RunFolder,
    damaged,
    lock_of,
    read_object,
    storage_errors,
    write_atomically,
    write_json,
)
from orchestrator.spec import JobSpec, dump_spec

STALE_S = 3600.0
"""A temporary file in which nothing was written for this long belongs to a process that died."""
MUST_MATCH = ("stage", "bf16", "global_batch_size", "total_steps", "labels")
"""Derived figures that a checkpoint depends on. The same number of workers must also keep `micro_batch_size`:
it then goes on bit-identically; another number adds up in another order anyway."""


def at_saved_stage(plan: Plan) -> Plan:
    """The plan, at the ZeRO stage of the run's checkpoints where the job leaves it to `auto`.

    Another number of workers may fit a lower stage; checkpoints are bound to the one they have.
    """
    source = RunFolder(Path(plan.run_dir)).plan
    old = read_object(source)
    if old is not None and old.get("stage") not in (None, 0, 1, 2, 3):
        raise damaged(source, f"stage is {old['stage']!r}")
    if old is None or plan.spec.zero.stage != "auto" or old.get("stage") in (None, plan.stage):
        return plan
    kept = at_workers(plan, plan.num_workers, old["stage"])
    return kept.model_copy(
        update={"reasons": {**kept.reasons, "stage": "the run's checkpoints are of this stage"}}
    )


@contextmanager
def locked(plan: Plan, fresh: bool) -> Iterator[RunFolder]:
    """The run folder, ready for a launch, locked against a second driver.

    Raises RunExistsError where another process trains this run, or where its checkpoints belong to a
    job that differs in more than what may change.
    """
    folder = RunFolder(Path(plan.run_dir))
    with locked_folder(folder.root, fresh):
        if folder.plan.exists():
            _must_fit(folder, plan)
        write_atomically(folder.spec, dump_spec(plan.spec))
        write_json(folder.plan, plan.model_dump(mode="json"))
        for request in (folder.stop_request, folder.handover_request):
            request.unlink(missing_ok=True)
        yield folder


@contextmanager
def locked_folder(root: Path, fresh: bool) -> Iterator[None]:
    """A writable folder that no other process works in; with `fresh`, an empty one.

    Raises RunExistsError where another process has it, OrchestratorError where it cannot be written.
    """
    _make_writable(root)
    with _file_lock(root):
        if fresh:
            _put_aside(root)
            _make_writable(root)
        _remove_leftovers(root)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                RunFolder(root).reserve.unlink(missing_ok=True)


def _remove_leftovers(root: Path) -> None:
    """Remove temporaries of atomic writes and of exports that killed processes left in `root`."""
    for left in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp"), *root.glob(".export-*")):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < STALE_S:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _make_writable(root: Path) -> None:
    """Find out now, not at the first checkpoint."""
    reserve = RunFolder(root).reserve
    try:
        root.mkdir(parents=True, exist_ok=True)
        reserve.write_bytes(bytes(2**20))
    except OSError as error:
        with contextlib.suppress(OSError):  # what was written of it would keep the disk full
            reserve.unlink(missing_ok=True)
        raise OrchestratorError(
            f"{root} cannot be written: {error.strerror}. "
            "Fix its permissions or free space, or set storage_path=… to another folder."
        ) from error


@contextmanager
def _file_lock(root: Path) -> Iterator[None]:
    """The lock dies with its process, so a killed driver leaves nothing to clean up."""
    with storage_errors(lock_of(root)):
        lock = open(lock_of(root), "w", encoding="ascii")  # noqa: SIM115, closed below
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunExistsError(
                f"{root}: another process is training this run. Wait for it, stop it, or use name=…"
            ) from error
        with contextlib.suppress(OSError):  # only for people to read
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def _put_aside(root: Path) -> None:
    """`--fresh` never overwrites: what was there moves to a dated folder beside it."""
    if any(path.name != RunFolder(root).reserve.name for path in root.iterdir()):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        root.rename(root.with_name(f"{root.name}.before-{stamp}"))


def _must_fit(folder: RunFolder, plan: Plan) -> None:
    old = read_object(folder.plan, {"spec": dict, "train_data": dict}) or {}
    new = plan.model_dump(mode="json")
    same, changed = compare_content(old, new, folder.plan)
    needed_by = decided_by(plan.spec)

    def may_change(path: str) -> bool:
        return path in same or may_change_on_resume(JobSpec, path, needed_by)

    for name in differences(old["spec"], new["spec"], may_change):
        why = f" ({', '.join(needed_by[name])} depends on it)" if needed_by.get(name) else ""
        changed.append(f"{name}: {_at(old['spec'], name)!r} → {_at(new['spec'], name)!r}{why}")
    same_size = old.get("num_workers") == new["num_workers"]
    must_match = (*MUST_MATCH, "micro_batch_size") if same_size else MUST_MATCH
    changed += [f"{k}: {old.get(k)!r} → {new[k]!r}" for k in must_match if old.get(k) != new[k]]
    if changed:
        raise another_job(folder.root, changed)


def compare_content(
    old: dict[str, Any], new: dict[str, Any], source: Path
) -> tuple[tuple[str, ...], list[str]]:
    """Compare what two plans' files hold: prepared rows, the teacher's answers, pretrained weights.

    Args:
        old: the plan of the run, as JSON.
        new: the plan of the job that continues it, as JSON.
        source: the file that `old` was read from.

    Returns (fields that may change, since they name the same content; descriptions of other content).
    Raises DamagedFileError where `old` is not as a plan is written.
    """
    try:
        known = None if old.get("base") is None else ModelIdentity.model_validate(old["base"])
    except ValidationError as error:
        raise damaged(source, "base is not a model's identity") from error
    wanted = ModelIdentity.model_validate(new["base"] or {})
    same: list[str] = []
    changed: list[str] = []
    for part, name, fields, what in (
        ("train_data", "folder", ("data.train", "model.tokenizer"), "the training data"),
        ("eval_data", "folder", ("data.eval",), "the evaluation data"),
        ("train_data", "teacher_folder", ("distillation.teacher", "distillation.revision"), "the teacher"),
    ):  # fmt: skip
        before, now = (_folder_name(one, part, name) for one in (old, new))
        if before != now:
            changed.append(f"the content of {what}")
        elif now:
            same += fields
    differs = None if known is None else known.differs(wanted)
    if differs is False:
        same += ("model.pretrained", "model.revision")
    elif differs:
        pinned = (
            f"; model.revision={known.commit} has the old ones" if known and known.commit else ""
        )
        changed.append(f"the weights of model.pretrained: {known} → {wanted}{pinned}")
    return tuple(same), changed


def _folder_name(plan: dict[str, Any], part: str, name: str) -> str:
    """Return the name of a folder of prepared rows, which tells their content; empty for none."""
    section = plan.get(part)
    folder = section.get(name) if isinstance(section, dict) else None
    return Path(folder).name if isinstance(folder, str) else ""


def another_job(root: Path, changed: list[str]) -> RunExistsError:
    """The error that names every difference between a run and the job that claims its name."""
    return RunExistsError(
        f"{root} holds a run of another job; it differs in:\n  "
        + "\n  ".join(changed)
        + "\nUse another name=…, put the old values back, or start over with --fresh (keeps the old folder)."
    )


def differences(old: Any, new: Any, may_change: Callable[[str], bool], path: str = "") -> list[str]:
    """Return the dotted paths at which two specs differ, without those that may change."""
    if path and may_change(path):
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
