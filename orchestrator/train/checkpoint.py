"""Checkpoints: written beside training, valid only with their commit marker and checksums.

    checkpoints/step-00000120-3f9a/
        engine/…            DeepSpeed's shards, one set per rank
        random-00000.pt     random state of rank 0
        files-00000.json    what rank 0 wrote: name → sha256, bytes
        COMMIT.json         written last, by rank 0, when all ranks' lists are there; holds their
                            checksums, everything else to restore, and a checksum of itself

The protocol needs nothing but a shared folder: it does not wait for Ray Train's controller, which
commits only when it polls, and several trials can run in one Ray Train run.

See docs/decisions/0011-checkpoints-have-a-commit-protocol-of-their-own.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.data.manifest import sha256_of
from orchestrator.errors import CheckpointError
from orchestrator.run_folder import fsync_dir, read_json, write_atomically, write_json

COMMIT = "COMMIT.json"
FORMAT = 2
"""Version of the commit marker. Version 1 had no checksum and no field `format`; it is still read."""
DAMAGED = "damaged-"
"""Begins the names of checkpoints that were found damaged; retention removes them."""
STAGING = ".staging-"
"""Begins the names of what is being made; whatever a killed attempt left of it is deleted."""
POLL_S = 0.02
SHARED_MEMORY = Path("/dev/shm")
MEMORY_SHARE = 0.1
"""A checkpoint is staged in memory where it takes at most this part of what is free."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint with a commit marker. `facts`: step, world size, metrics and whatever was saved along."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def committed(folder: Path) -> list[Committed]:
    """Return the checkpoints with an intact commit marker, newest step first."""
    found = []
    for marker in folder.glob(f"step-*/{COMMIT}"):
        try:
            found.append(_read_marker(marker))
        except CheckpointError:
            continue
    return sorted(found, key=lambda c: (c.step, c.facts.get("time", 0)), reverse=True)


def _damaged_markers(folder: Path) -> list[tuple[int, Path, str]]:
    """Return (step by its name, folder, problem) of each checkpoint with a damaged marker, newest first."""
    found = []
    for marker in folder.glob(f"step-*/{COMMIT}"):
        try:
            _read_marker(marker)
        except CheckpointError as error:
            found.append((_step_in_name(marker.parent) or 0, marker.parent, str(error)))
    return sorted(found, reverse=True)


def _read_marker(marker: Path) -> Committed:
    """Return the checkpoint that `marker` commits; raises CheckpointError where the marker is damaged."""
    try:
        text = marker.read_bytes().decode("utf-8")
        facts = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{COMMIT} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{COMMIT} holds {type(facts).__name__} instead of an object")
    if "format" in facts or "sha256" in facts:
        if facts.get("format") != FORMAT:
            raise CheckpointError(f"{COMMIT} has format {facts.get('format')!r}, not {FORMAT}")
        # The text is compared, not only its content: it changes with every bit, the content need not.
        if text != _marker_text(facts):
            raise CheckpointError(f"{COMMIT} does not match its checksum")
    _check_types(facts)
    if facts["step"] != _step_in_name(marker.parent):
        raise CheckpointError(f"{COMMIT} says step {facts['step']}, its folder says another")
    return Committed(marker.parent, facts)


def _marker_text(facts: dict[str, Any]) -> str:
    """Return the commit marker's text: `facts` with the checksum of their canonical form."""
    plain = {name: value for name, value in facts.items() if name != "sha256"}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**plain, "sha256": digest}, indent=2) + "\n"


def _check_types(facts: dict[str, Any]) -> None:
    """Raise CheckpointError for a field of the wrong type, as a marker without a checksum may have."""
    progress = facts.get("progress", {})
    for name, value, least in (
        ("step", facts.get("step"), 0),
        ("world_size", facts.get("world_size"), 1),
        ("stage", facts.get("stage", 0), 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CheckpointError(f"{COMMIT}: {name} is {value!r}")
    time_s = facts.get("time", 0)
    if not isinstance(time_s, int | float) or isinstance(time_s, bool):
        raise CheckpointError(f"{COMMIT}: time is {time_s!r}")
    if not isinstance(progress, dict):
        raise CheckpointError(f"{COMMIT}: progress is {progress!r}")
    if progress.get("step", facts["step"]) != facts["step"]:
        raise CheckpointError(
            f"{COMMIT} says step {facts['step']}, its progress says {progress['step']!r}"
        )


def _step_in_name(folder: Path) -> int | None:
    """Return the step in a checkpoint's folder name, `step-00000120-3f9a`."""
    found = re.fullmatch(r"step-(\d+)(-.*)?", folder.name)
    return int(found[1]) if found else None


def damage(checkpoint: Committed) -> str | None:
    """Return what is wrong with a checkpoint's files, or None. Reads every byte."""
    lists = checkpoint.facts.get("lists")
    for rank in range(int(checkpoint.facts["world_size"])):
        name = _list_name(rank)
        try:
            if lists is not None and sha256_of(checkpoint.folder / name) != lists[name]:
                return f"{name} does not match its checksum"
            listed = read_json(checkpoint.folder / name)
            wanted = {str(n): (int(one["bytes"]), str(one["sha256"])) for n, one in listed.items()}
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            return f"{name} is missing or torn"
        for file, (size, digest) in wanted.items():
            if problem := _file_damage(checkpoint.folder, file, size, digest):
                return problem
    return None


def _list_name(rank: int) -> str:
    return f"files-{rank:05d}.json"


def _file_damage(folder: Path, name: str, size: int, digest: str) -> str | None:
    """Return how one file differs from what was written, or None."""
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        return None if sha256_of(path) == digest else f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Committed | None:
    """Return the newest checkpoint whose marker and files are as they were written, or None.

    `warn` is told of each damaged checkpoint that is newer, and of each damaged commit marker.
    """
    for _, broken, problem in _damaged_markers(folder):
        warn(f"checkpoint {broken.name} is damaged ({problem}): it is not used")
    for checkpoint in committed(folder):
        problem_in_files = damage(checkpoint)
        if problem_in_files is None:
            return checkpoint
        warn(
            f"checkpoint {checkpoint.folder.name} is damaged ({problem_in_files}): using the one before"
        )
    return None


def put_aside_newer(folder: Path, chosen: Committed | None) -> None:
    """Rename what was passed over for `chosen`, and all with damaged markers, to `damaged-…`.

    Among the newest that are kept, each would cost a good one its place. Only safe while nobody writes here.
    """
    for _, broken, _ in _damaged_markers(folder):
        _put_aside(broken)
    for checkpoint in committed(folder):
        if chosen is not None and checkpoint.folder == chosen.folder:
            return
        _put_aside(checkpoint.folder)


def _put_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint; where one of that name has been put aside before, it is replaced."""
    target = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)


def remove_uncommitted(folder: Path) -> None:
    """Delete what killed attempts left half-written. Only safe while nobody writes here."""
    for path in folder.glob("step-*"):
        if not (path / COMMIT).exists():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """One rank's side of saving. At most one checkpoint is in flight; `save` waits for the one before.

    `attempt`: the same short text on all ranks, new per start, so that no folder is ever written twice.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        keep: int,
        attempt: str,
        on_commit: Callable[[Committed], None] = lambda _: None,
        size_bytes: int = 0,
    ) -> None:
        """`size_bytes`: of a checkpoint of all ranks; 0 where it is not known."""
        folder.mkdir(parents=True, exist_ok=True)
        self.size_bytes = size_bytes
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.keep, self.attempt, self.on_commit = keep, attempt, on_commit
        self.best_step: int | None = None
        self._thread: threading.Thread | None = None
        self._published, self._abandoned = threading.Event(), threading.Event()
        self._published.set()
        self._error: BaseException | None = None
        for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
        """Let `write(folder)` put this rank's files into a staging folder, then commit in the background.

        `write` is collective and blocks; hashing, moving and committing do not. Returns the folder that
        will hold the checkpoint. What goes wrong shows in `failed` and is raised by `wait`, not here:
        the other ranks would wait for this one. Call `wait` before.
        """
        target = self.folder / f"step-{step:08d}-{self.attempt}"
        try:
            staging = self._staging()
        except OSError as error:  # the folder is gone; the other ranks still wait for us in `write`
            self._error = error
            staging = Path(tempfile.mkdtemp())
        try:
            write(staging)
        except OSError as error:
            self._error = error
        if self._error is not None:
            shutil.rmtree(staging, ignore_errors=True)
            return target
        facts = {"step": step, "world_size": self.world_size, "time": time.time(), **facts}
        self._published.clear()
        self._thread = threading.Thread(
            target=self._finish,
            args=(staging, target, facts),
            name=f"checkpoint-{step}",
            daemon=True,
        )
        self._thread.start()
        return target

    def failed(self) -> bool:
        """Whether the background part went wrong; `wait` raises it."""
        return self._error is not None

    def wait_published(self) -> None:
        """Wait until this rank's own files are there; raises CheckpointError where they cannot be."""
        self._published.wait()
        if self._error is not None:
            raise CheckpointError(_cannot_write(self.folder, self._error)) from self._error

    def abandon(self) -> None:
        """Give up the checkpoint in flight: a rank cannot write its part, and rank 0 would wait for it."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = None
        self._abandoned.clear()

    def wait(self) -> None:
        """Wait until nothing is in flight; raises CheckpointError for a failure since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(_cannot_write(self.folder, error)) from error

    def _staging(self) -> Path:
        """A folder to write into while training stands still: in memory where there is plenty of it,
        else on local disk; beside the target where that is the same file system anyway."""
        if self._fits_memory():
            return Path(tempfile.mkdtemp(prefix=self._prefix, dir=SHARED_MEMORY))
        same = os.stat(tempfile.gettempdir()).st_dev == os.stat(self.folder).st_dev
        parent = str(self.folder) if same else None
        return Path(tempfile.mkdtemp(prefix=self._prefix, dir=parent))

    def _fits_memory(self) -> bool:
        """Whether the checkpoint of all ranks is a small part of what this node has free."""
        os.stat(self.folder)  # where it is gone, that is said now
        if not self.size_bytes or not SHARED_MEMORY.is_dir():
            return False
        free = min(shutil.disk_usage(SHARED_MEMORY).free, psutil.virtual_memory().available)
        return self.size_bytes <= free * MEMORY_SHARE

    @property
    def _prefix(self) -> str:
        """Names this rank's staging folders, so that those of a killed one are found again."""
        place = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        return f"{STAGING}{place}-{self.rank:05d}-"

    def _finish(self, staging: Path, target: Path, facts: dict[str, Any]) -> None:
        try:
            publish(staging, target, self.rank)
            self._published.set()
            if self.rank == 0:
                self._commit(target, facts)
        except BaseException as error:  # noqa: BLE001, carried to the training thread
            self._error = error
        finally:
            self._published.set()
            shutil.rmtree(staging, ignore_errors=True)

    def _commit(self, target: Path, facts: dict[str, Any]) -> None:
        lists = [target / _list_name(rank) for rank in range(self.world_size)]
        deadline = time.monotonic() + 600
        while not all(path.exists() for path in lists):
            if self._abandoned.is_set():
                return
            if time.monotonic() > deadline:
                raise CheckpointError(f"not all ranks wrote their part of {target.name} in 600 s")
            time.sleep(POLL_S)
        checksums = {path.name: sha256_of(path) for path in lists}
        marker = _marker_text(
            json.loads(json.dumps({"format": FORMAT, **facts, "lists": checksums}))
        )
        write_atomically(target / COMMIT, marker)
        fsync_dir(self.folder)
        self.on_commit(Committed(target, facts))
        retain(self.folder, self.keep, self.best_step)


def publish(staging: Path, target: Path, rank: int) -> None:
    """Move a rank's files into the checkpoint, durable, and list them with their checksums."""
    listed: dict[str, dict[str, Any]] = {}
    target.mkdir(exist_ok=True)  # not its parents: where they are gone, so is the shared disk
    for source in sorted(p for p in staging.rglob("*") if p.is_file()):
        name = source.relative_to(staging).as_posix()
        listed[name] = {"sha256": sha256_of(source), "bytes": source.stat().st_size}
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, destination)
        with open(destination, "rb+") as handle:
            os.fsync(handle.fileno())
    write_json(target / _list_name(rank), listed)


def retain(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete committed checkpoints but the newest `keep` and the best. The marker goes first.

    Damaged ones that were put aside go once `keep` newer checkpoints are committed.
    """
    found: Sequence[Committed] = committed(folder)
    for checkpoint in found[keep:]:
        if checkpoint.step != best_step:
            (checkpoint.folder / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.folder, ignore_errors=True)
    if len(found) < keep or not found:
        return
    oldest = found[keep - 1].step
    for broken in folder.glob(f"{DAMAGED}step-*"):
        step = _step_in_name(Path(broken.name.removeprefix(DAMAGED)))
        if step is not None and step <= oldest:
            shutil.rmtree(broken, ignore_errors=True)


def _cannot_write(folder: Path, error: BaseException) -> str:
    return (
        f"a checkpoint could not be written to {folder}: {error}. "
        "Earlier committed checkpoints are intact. Free space or fix the folder, then run the same command to resume."
    )
