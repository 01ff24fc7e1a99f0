"""Folders for sockets and logs of a local Ray: short enough, writable, and removed when nobody uses them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import OrchestratorError

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux."""
BELOW_ROOT = "/ray-12345678/1/session_2026-12-01_00-00-00_123456_4194304/sockets/plasma_store.1"
"""What Ray adds to the folder in which a session's folder is made."""
PREFIX, LOCK, FAILED = "ray-", "in-use", "failed"
KEPT_S = 86_400.0
"""How long the folder of a session that failed is kept for its logs."""


def temporary_root() -> Path:
    """Return the folder for temporary files: the user's, or a shorter one where sockets would not fit.

    Raises OrchestratorError where none can be used.
    """
    wanted = os.environ.get("RAY_TMPDIR")
    candidates = [wanted] if wanted else []
    with suppress(FileNotFoundError):  # none is writable; each is named below
        candidates.append(tempfile.gettempdir())
    candidates += ["/tmp", "/var/tmp", "/dev/shm"]
    reasons = {}
    for candidate in dict.fromkeys(candidates):
        reason = _unusable(candidate)
        if reason is None:
            return Path(candidate)
        reasons[candidate] = reason
    found = "; ".join(f"{folder}: {reason}" for folder, reason in reasons.items())
    raise OrchestratorError(
        f"no folder for Ray's sockets and logs: {found}. Name one: export RAY_TMPDIR=/a/short/folder"
    )


def _unusable(folder: str) -> str | None:
    """Return why Ray cannot have its files in `folder`."""
    size, limit = len(os.fsencode(folder)), SOCKET_PATH_BYTES - len(BELOW_ROOT)
    if not os.path.isabs(folder):
        return "not an absolute path"
    if size > limit:
        return f"{size} bytes long, and sockets below it may have {limit} at most"
    try:
        os.rmdir(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextmanager
def session_folder() -> Iterator[Path]:
    """Make a folder for one Ray session; it is removed with the block, and kept for its logs where that fails.

    A session that failed leaves its folder for a day, one that was killed until the next session starts.
    """
    root = temporary_root()
    _remove_left(root)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    lock = open(folder / f"{LOCK}.new", "w")  # noqa: SIM115, held until the block ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, folder / LOCK)  # from now on it says whether the folder is in use
    try:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        with suppress(OSError):
            (folder / FAILED).touch()
        raise
    finally:
        lock.close()


def _remove_left(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}????????"):
        with suppress(OSError), open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            failed_s_ago = (
                time.time() - folder.stat().st_mtime if (folder / FAILED).exists() else KEPT_S
            )
            if folder.stat().st_uid == os.getuid() and failed_s_ago >= KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
