"""The run folder: every path a run writes, in one place, and atomic writes into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedFileError, OrchestratorError, StorageError
from orchestrator.renames import upgraded

FIXES = {
    "plan.json": "Restore it from a copy, or start over with --fresh (keeps the old folder).",
    "sweep.json": "Restore it from a copy, or start over with --fresh (keeps the old folder).",
    "outcome.json": "Delete it and run the same command again: it resumes from the newest checkpoint.",
    "baseline.json": "Delete it: it is computed again.",
    "teacher.json": "Delete it: it is computed again.",
    "manifest.json": "Delete its folder and run `orchestrator prepare` again.",
    "orchestrator.json": "Delete this folder and export the run again.",
}
"""What to do about a damaged file, by its name."""
OUTCOME_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "status": str,
    "step": int,
    "message": str,
    "best": (dict, type(None)),
    "last_eval": (dict, type(None)),
    "facts": dict,
}
"""The fields of `outcome.json` of a run, and their types."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` durably, so that a reader sees the old file or the new one, never a torn one.

    Raises StorageError where that fails; nothing of the attempt stays behind.
    """
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                handle.write(content.encode() if isinstance(content, str) else content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path` and the fix."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> StorageError:
    """Return the error for a file that cannot be written, with the error number of its cause."""
    why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    told = StorageError(
        f"{path} cannot be written: {why}. Free space or fix the permissions of {path.parent}, "
        "then run the same command again."
    )
    told.errno = getattr(error, "errno", None)
    return told


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON in `path`, or None where the file does not exist; plans of older formats are upgraded.

    Raises DamagedFileError where it is no JSON, StorageError where it cannot be read.
    """
    try:
        return upgraded(path.name, json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error


def read_object(
    path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None
) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None where the file does not exist.

    Args:
        path: the file.
        fields: names that the object must have, each with the type of its value.

    Raises DamagedFileError where the file holds anything else.
    """
    found = read_json(path)
    if found is None and not path.exists():
        return None
    if not isinstance(found, dict):
        raise damaged(path, f"it holds {type(found).__name__} instead of an object")
    for name, wanted in (fields or {}).items():
        value = found.get(name)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            shown = "is missing" if name not in found else f"is {value!r}"
            raise damaged(path, f"{name} {shown}")
    return found


def damaged(path: Path, why: str) -> DamagedFileError:
    """Return the error for a file that is not as it was written, with the fix for its kind."""
    fix = FIXES.get(path.name, "Restore it from a copy, or delete it.")
    return DamagedFileError(f"{path} is damaged: {why}. {fix}")


def read_outcome(folder: RunFolder) -> dict[str, Any] | None:
    """Return how the run's last launch ended, or None while it runs.

    Raises DamagedFileError where the file is not as it was written.
    """
    outcome = read_object(folder.outcome, OUTCOME_FIELDS)
    for name in ("best", "last_eval"):
        record = (outcome or {}).get(name)
        if record is not None and not isinstance(record.get("step"), int):
            raise damaged(folder.outcome, f"{name}.step is {record.get('step')!r}")
    return outcome


@dataclass(frozen=True)
class _Folder:
    """Paths common to the folders of runs and of sweeps."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        """The job as the user wrote it, overrides applied; `train` accepts it again."""
        return self.root / "job.yaml"

    @property
    def outcome(self) -> Path:
        """The result of the last launch; absent while it runs."""
        return self.root / "outcome.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def reserve(self) -> Path:
        """A megabyte kept back, so that a run on a full disk can still say how it ended."""
        return self.root / ".reserve"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


@dataclass(frozen=True)
class RunFolder(_Folder):
    """Paths of one run. Everything a run leaves behind lies below `root`."""

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def steps(self) -> Path:
        """One JSON object per optimizer step."""
        return self.root / "metrics" / "steps.jsonl"

    @property
    def evals(self) -> Path:
        """One JSON object per evaluation."""
        return self.root / "metrics" / "evals.jsonl"

    @property
    def events(self) -> Path:
        """Starts, restarts, checkpoints, stops: what happened and when."""
        return self.root / "metrics" / "events.jsonl"

    @property
    def baseline(self) -> Path:
        return self.root / "metrics" / "baseline.json"

    @property
    def teacher(self) -> Path:
        """Teacher and student compared, where the job has a teacher."""
        return self.root / "metrics" / "teacher.json"

    @property
    def stop_request(self) -> Path:
        """Exists when somebody asked the workers to commit and leave."""
        return self.root / "STOP"

    @property
    def handover_request(self) -> Path:
        """Exists while the workers are asked to commit and hand over to another number of them."""
        return self.root / "HANDOVER"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"


@dataclass(frozen=True)
class SweepFolder(_Folder):
    """Paths of one sweep. Its trials are runs, each with a run folder below `trials`."""

    @property
    def plan(self) -> Path:
        return self.root / "sweep.json"

    @property
    def log(self) -> Path:
        """Trials, reports, decisions and ends: the truth of the sweep."""
        return self.root / "trials.jsonl"

    @property
    def slots(self) -> Path:
        """Records of the trials that each slot ran, with start and end."""
        return self.root / "slots.jsonl"

    @property
    def events(self) -> Path:
        """Starts and ends of the sweep itself."""
        return self.root / "events.jsonl"

    @property
    def best(self) -> Path:
        """The best trial's job, ready to `train`."""
        return self.root / "best.yaml"

    def trial(self, trial: str) -> RunFolder:
        """The run folder of one trial."""
        return RunFolder(self.root / "trials" / trial)


def find_sweep(run: str | Path, storage_path: str | Path = "runs") -> SweepFolder:
    """A sweep by name below `storage_path`, or by path. Raises OrchestratorError where there is none."""
    for root in (Path(storage_path) / run, Path(run)):
        if _is_sweep(root):
            return SweepFolder(root.absolute())
        if (root / "plan.json").exists():
            raise OrchestratorError(
                f"{run} is a training run, not a sweep: `orchestrator report {run}` shows what it reached."
            )
    raise OrchestratorError(
        f"{run}: no such sweep below {storage_path}/. `orchestrator runs` lists them."
    )


def _is_sweep(root: Path) -> bool:
    """One that has begun: its plan comes later than its first event."""
    return (root / "sweep.json").exists() or (root / "events.jsonl").exists()


def in_use(root: Path) -> bool:
    """Tell whether a process holds the lock of a run or sweep folder."""
    try:
        with open(lock_of(root), encoding="ascii") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def lock_of(root: Path) -> Path:
    """The file that is locked while a process works in `root`; beside it, so that `--fresh` can move the folder."""
    return root.with_name(f".{root.name}.lock")


def list_runs(storage_path: Path) -> list[RunFolder]:
    """Every run below `storage_path`, oldest first."""
    found = [path.parent for path in storage_path.glob("*/plan.json")]
    return [RunFolder(path) for path in sorted(found, key=lambda p: p.stat().st_mtime)]


def list_sweeps(storage_path: Path) -> list[SweepFolder]:
    """Every sweep below `storage_path`, oldest first."""
    found = [path.parent for path in storage_path.glob("*/sweep.json")]
    return [SweepFolder(path) for path in sorted(found, key=lambda p: p.stat().st_mtime)]


def find_either(run: str | Path, storage_path: str | Path = "runs") -> RunFolder | SweepFolder:
    """A run or a sweep by name below `storage_path`, or by path. Raises OrchestratorError where there is none."""
    is_sweep = any(_is_sweep(root) for root in (Path(storage_path) / run, Path(run)))
    return find_sweep(run, storage_path) if is_sweep else find_run(run, storage_path)


def find_run(run: str | Path, storage_path: str | Path = "runs") -> RunFolder:
    """A run by name below `storage_path`, or by path. Raises OrchestratorError where there is none."""
    for root in (Path(storage_path) / run, Path(run)):
        if (root / "plan.json").exists():
            return RunFolder(root.absolute())
        if _is_sweep(root):
            raise OrchestratorError(
                f"{run} is a sweep. Its trials are runs: {root / 'trials'}/TRIAL. `orchestrator results` lists them."
            )
    raise OrchestratorError(
        f"{run}: no such run below {storage_path}/. `orchestrator runs` lists them."
    )
