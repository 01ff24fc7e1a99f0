"""Pack the working directory as one zip file."""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec

MIB = 2**20
LIMIT_BYTES = 100 * MIB
"""The Jobs API refuses larger packages (HTTP 413)."""
MAX_INPUT_BYTES = 10 * LIMIT_BYTES
"""Larger working directories are refused without compressing them."""
NEVER = (".git", ".hg", ".svn", ".venv", "__pycache__", "node_modules")
IGNORE_FILES = (".gitignore", ".rayignore")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time stamp of every file in the zip, so that unchanged files make an identical package, uploaded once."""


def files_to_pack(root: Path, spec: JobSpec, job: Path) -> list[Path]:
    """Return the files to pack, sorted and relative to `root`.

    Excluded are the folders in NEVER, matches of `.gitignore` and `.rayignore` (at any depth) and of
    `runtime.excludes`. The job file and relative paths in the job are always included.
    """
    files = set(_walk(root, spec.runtime.excludes))
    for pattern in (str(job), *paths_in(spec)):
        files |= _matching(root, pattern)
    return sorted(files)


def paths_in(spec: JobSpec) -> list[str]:
    """Return the relative paths and globs in the job: data, model, tokenizer, teacher and chat template."""
    data, model = spec.data, spec.model
    paths: list[str | None] = [model.pretrained, model.tokenizer, model.chat_template]
    paths += [spec.distillation.teacher] if spec.distillation else []
    for value in (data.train, data.eval):
        paths += [value] if isinstance(value, str) else (value or ())
    return [p for p in paths if p and "://" not in p and not Path(p).is_absolute()]


def pack(root: Path, files: Sequence[Path], target: Path) -> Path:
    """Write `files` as a zip to `target`.

    Raises:
        OrchestratorError: The package exceeds LIMIT_BYTES; names the largest files.
    """
    sizes = {f: (root / f).stat().st_size for f in files}
    if sum(sizes.values()) > MAX_INPUT_BYTES:
        raise _too_large(sum(sizes.values()), sizes)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in files:
            info = zipfile.ZipInfo(file.as_posix(), EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = ((root / file).stat().st_mode & 0o777) << 16
            archive.writestr(info, (root / file).read_bytes())
    if target.stat().st_size >= LIMIT_BYTES:
        raise _too_large(target.stat().st_size, sizes)
    return target


def _walk(root: Path, excludes: Sequence[str]) -> Iterator[Path]:
    rules = {root.parent: [(root, GitIgnoreSpec.from_lines(excludes))]}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        rules[here] = rules[here.parent] + [(here, s) for s in _ignore_files(here)]
        folders[:] = sorted(
            f for f in folders if f not in NEVER and not _ignored(here / f, rules[here], "/")
        )
        for file in files:
            path = here / file
            if path.is_file() and not _ignored(path, rules[here]):
                yield path.relative_to(root)


def _ignore_files(folder: Path) -> Iterator[GitIgnoreSpec]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            yield GitIgnoreSpec.from_lines(lines)


def _ignored(path: Path, rules: list[tuple[Path, GitIgnoreSpec]], suffix: str = "") -> bool:
    return any(spec.match_file(path.relative_to(at).as_posix() + suffix) for at, spec in rules)


def _matching(root: Path, pattern: str) -> set[Path]:
    """Return the files of one path or glob below `root`. A hub id matches nothing."""
    files: set[Path] = set()
    for match in glob.glob(pattern, root_dir=root, recursive=True):
        path = root / match
        if path.is_file():
            files.add(Path(os.path.normpath(match)))  # `a/../b` would not be unpacked
        elif path.is_dir():
            files |= {
                Path(os.path.normpath(f.relative_to(root))) for f in path.rglob("*") if f.is_file()
            }
    return files


def _too_large(total: int, sizes: dict[Path, int]) -> OrchestratorError:
    largest = sorted(sizes.items(), key=lambda kv: -kv[1])[:5]
    shown = "\n".join(f"  {size / MIB:8.1f} MiB  {file}" for file, size in largest)
    return OrchestratorError(
        f"the package of the working directory has {total / MIB:.0f} MiB; the limit of the Jobs API is "
        f"{LIMIT_BYTES // MIB} MiB. The largest files:\n{shown}\n"
        "Exclude files with runtime.excludes or .rayignore, and put data and models on a path that every node can read."
    )
