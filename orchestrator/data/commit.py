"""Shards made by many tasks: run them, and let their folder appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.manifest import Manifest, read_manifest
from orchestrator.errors import OrchestratorError
from orchestrator.run_folder import fsync_dir, storage_error, write_json

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
PROGRESS_S = 5.0
"""Seconds between lines on the progress."""
RAY_ADVICE = "\nFailed to apply UDF transform"
"""Begins what Ray Data 2.60 appends to the message of an error."""
STALE_S = 3600.0
"""A temporary folder in which nothing was written for this long belongs to a process that died."""


def make_folder(folder: Path, write: Callable[[Path], Manifest]) -> tuple[Path, Manifest]:
    """(`folder`, its manifest), once `write` has put shards into the temporary folder that it is given.

    Where somebody else made the same folder in the meantime, theirs is returned.
    """
    _remove_stale(folder)
    # Not the process id: drivers in two pods can have the same.
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir(parents=True)
    try:
        manifest = write(temporary)
        write_json(temporary / "manifest.json", manifest.model_dump(mode="json"))
        return _commit(temporary, folder, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _commit(temporary: Path, folder: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    fsync_dir(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Somebody else prepared the same fingerprint in the meantime …
        if theirs := read_manifest(folder):
            return folder, theirs
        # … or somebody deleted the manifest, and what is left is of no use to anyone.
        remains = temporary.with_name(f"{temporary.name.removesuffix('.tmp')}.remains.tmp")
        os.rename(folder, remains)
        shutil.rmtree(remains, ignore_errors=True)
        return _commit(temporary, folder, manifest)
    fsync_dir(folder.parent)
    return folder, manifest


def _remove_stale(folder: Path) -> None:
    """Remove what killed preparations of the same fingerprint left beside `folder`."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        try:
            written = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:  # its owner is at work on it, or has just removed it
            continue
        if time.time() - written > STALE_S:
            shutil.rmtree(left, ignore_errors=True)


class Progress:
    """Lines on standard error that tell how much of a long preparation is done."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.started = self.shown = time.monotonic()

    def show(self, done: int) -> None:
        """Print a line where the last one is PROGRESS_S old."""
        now = time.monotonic()
        if now - self.shown < PROGRESS_S or done == self.parts:
            return
        self.shown = now
        print(
            f"prepared {done} of {self.parts} parts, {now - self.started:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def run_all(work: Sequence[Any], function: Any, **how: Any) -> list[dict[str, Any]]:
    """Return the result of `function` for each item (see `work_of`) under `out`, as JSON, in the order of `work`.

    Runs through Ray Data; `how`: options of its `map`, as `compute` for a class. Raises the first
    error that a piece ends with.
    """
    import ray
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    items = [{"work": w, "here": os.getcwd()} for w in work]
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(function, **how)
    done: list[dict[str, Any]] = []
    progress = Progress(len(items))
    try:
        for row in dataset.iter_rows():
            done.append(json.loads(row["out"]))
            progress.show(len(done))
        return done
    except RayTaskError as error:
        if isinstance(error.cause, OrchestratorError):
            raise _without_advice(error.cause) from None
        if getattr(error.cause, "errno", None) in DISK_ERRORS:
            named = getattr(error.cause, "filename", None) or "data.prepared_dir"
            raise storage_error(Path(named), error.cause) from None
        raise


def _without_advice(error: OrchestratorError) -> OrchestratorError:
    """Return a task's error without the lines that Ray Data adds to its message on retries."""
    message = str(error).partition(RAY_ADVICE)[0]
    error.args = (message, *error.args[1:])
    return error


def work_of(item: dict[str, Any]) -> Any:
    """An item's work. The process goes to the driver's folder where its node has it: the job's paths are
    relative to it."""
    if os.path.isdir(item["here"]):
        os.chdir(item["here"])
    return item["work"]
