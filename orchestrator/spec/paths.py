"""Paths and URLs of a job file: how they are written, and which files they name."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from pathlib import PurePath
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from orchestrator.errors import Problem

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of a URL. `pathlib` turns `s3://` into `s3:/`, so one slash is enough."""
SAME_SCHEME = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""Scheme → another name of the same storage that pyarrow knows."""
ARROW_SCHEMES = ("s3", "gs", "hdfs", "viewfs", "abfs", "abfss")
"""Schemes that pyarrow reads by itself."""


def plain_path(text: str) -> str:
    """Return a path or URL with `~` expanded, `file://` URLs as paths, `s3a://` and `s3n://` as `s3://`.

    Raises ValueError for text that no file can be called.
    """
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    if text == "~" or text.startswith(("~/", f"~{os.sep}")):
        return os.path.expanduser(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    if scheme.lower() == "file":
        return unquote(urlsplit(text).path)
    return f"{SAME_SCHEME.get(scheme.lower(), scheme.lower())}://{rest}"


PathText = Annotated[str, AfterValidator(plain_path)]
"""A path or URL of a job file, as `plain_path` writes it."""


def is_url(path: str) -> bool:
    """Return whether `path` names a place on another storage."""
    return bool(URL.match(path))


def has_wildcards(path: str) -> bool:
    """Return whether `path` holds characters that a glob gives a meaning."""
    return any(character in path for character in "*?[")


def local_files(path: str) -> list[str]:
    """Return the local files that a path or glob names, sorted; an empty list where there is none.

    A file or folder of exactly this name wins over the glob. Globs skip hidden files and folders.
    """
    try:
        if os.path.isfile(path):
            return [path]
        return sorted(p for p in glob.glob(_pattern(path), recursive=True) if os.path.isfile(p))
    except (OSError, ValueError, re.error):
        return []


def _pattern(path: str) -> str:
    """Return a path for `glob` in which the folders that exist as written are literal."""
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return glob.escape(folder) + path[len(folder) :]


def is_hidden(path: str, root: str = "") -> bool:
    """Return whether a file that a glob found, or a folder of it below `root`, is hidden."""
    below = path.removeprefix(root)
    return any(part.startswith(".") for part in PurePath(below).parts if part not in (".", ".."))


def no_such_file(path: str) -> tuple[str, str]:
    """Return why a local path or glob names no file, and what to write instead."""
    if os.path.isdir(path):
        return "is a folder, not a file", _files_inside(path)
    matched = _quietly_globbed(path) if has_wildcards(path) else []
    if matched:
        return "matches folders only", f"name their files, as in {path.rstrip('/')}/*"
    return "no such file", near_file(path)


def near_file(path: str) -> str:
    """Return what stands beside a path that does not exist."""
    parent = os.path.dirname(path) or "."
    try:
        names = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except FileNotFoundError:
        return f"the folder {parent!r} does not exist here ({os.getcwd()})"
    except (OSError, ValueError) as error:
        return f"the folder {parent!r} cannot be read: {getattr(error, 'strerror', None) or error}"
    close = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.7)
    if close:
        return f"did you mean {os.path.join(os.path.dirname(path), close[0])!r}?"
    return f"{parent!r} holds: {', '.join(names[:6]) or 'nothing'}"


def _files_inside(folder: str) -> str:
    """Return a glob for the most frequent kind of file in a folder."""
    try:
        names = [n for n in os.listdir(folder) if not n.startswith((".", "_"))]
    except OSError:
        names = []
    kinds = Counter(os.path.splitext(n)[1] for n in names if os.path.isfile(f"{folder}/{n}"))
    kinds.pop("", None)
    common = kinds.most_common(1)[0][0] if kinds else ".jsonl"
    deep = "" if kinds or not names else "/**"
    return f"{folder.rstrip('/')}{deep}/*{common}"


def _quietly_globbed(path: str) -> list[str]:
    try:
        return glob.glob(_pattern(path), recursive=True)
    except (OSError, ValueError, re.error):
        return []


def scheme_problem(field: str, url: str) -> Problem | None:
    """Return why data cannot be read from `url`, or None: an unknown scheme, or a package that is missing."""
    import fsspec

    scheme = url.partition(":")[0]
    if "://" not in url:
        return Problem(field, "is no URL", f"{scheme}://…", url)
    if scheme in ARROW_SCHEMES:
        return None
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        return Problem(field, f"this machine cannot read {scheme}://", str(error), url)
    except ValueError:
        known = sorted({*ARROW_SCHEMES, *fsspec.available_protocols()})
        close = difflib.get_close_matches(scheme, known, n=1)
        fix = f"did you mean {close[0]}://?" if close else f"choose from: {', '.join(known)}"
        return Problem(field, f"unknown URL scheme {scheme}://", fix, url)
    return None
