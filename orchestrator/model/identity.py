"""Identity of the weights that a job begins with: their content, whatever path or name leads to it."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec
from orchestrator.values import Frozen

HASHED_BYTES = 2**29
"""A file up to this size is hashed as a whole; of a larger one its ends and SAMPLES pieces between."""
SAMPLES = 128
PIECE_BYTES = 2**20
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.h5", "*.msgpack")
"""Patterns of weight files; the first that finds any names them, as when transformers loads."""
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Fields of a config that say nothing about the model."""


class ModelIdentity(Frozen):
    """Identity of pretrained weights. Empty for a model that begins with random ones."""

    commit: str | None = None
    """The hub's commit that the name and revision stood for."""
    content: str | None = None
    """Digest of the weight files and the config; None where they have not been downloaded."""

    def differs(self, other: ModelIdentity) -> bool | None:
        """Return whether the weights are others; None where that cannot be told."""
        for mine, theirs in ((self.content, other.content), (self.commit, other.commit)):
            if mine is not None and theirs is not None:
                return mine != theirs
        return None

    def __str__(self) -> str:
        return (self.content or self.commit or "none")[:12]


def identity_of(spec: JobSpec) -> ModelIdentity:
    """Return the identity of the weights that the job's model begins with."""
    model = spec.model
    if model.pretrained is None:
        return ModelIdentity()
    return source_identity(model.pretrained, model.revision, model.gguf_file)


def source_identity(
    source: str, revision: str | None, gguf_file: str | None = None
) -> ModelIdentity:
    """Return the identity of a local folder, or of a hub id at a revision.

    Args:
        source: folder or hub id.
        revision: branch, tag or commit on the hub.
        gguf_file: name of the file with the weights, where they are in a GGUF.
    """
    if Path(source).is_dir():
        return ModelIdentity(content=_content(Path(source), gguf_file))
    file = _cached_file(source, gguf_file or "config.json", revision)
    snapshot = (
        next((p for p in file.parents if p.parent.name == "snapshots"), None) if file else None
    )
    if snapshot is None:
        return ModelIdentity()
    return ModelIdentity(commit=snapshot.name, content=_content(snapshot, gguf_file))


def check_base(spec: JobSpec, known: ModelIdentity | None) -> None:
    """Raise OrchestratorError where the job's pretrained weights are not those that a run began with.

    Weights that are not trained are in no checkpoint: a run's result is complete only with its own base.
    """
    if known is None:
        return
    found = identity_of(spec)
    if known.differs(found):
        pinned = f", or set model.revision={known.commit}" if known.commit else ""
        raise OrchestratorError(
            f"model.pretrained = {spec.model.pretrained!r} holds other weights than this run began with "
            f"({found}, not {known}). Frozen weights are not in checkpoints, and adapters fit only their own "
            f"base: put the old files back{pinned}, or start over with --fresh."
        )


def _cached_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return a hub file in the cache, downloaded where it is not there; None where it cannot be had."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, name, revision=revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _content(folder: Path, gguf_file: str | None) -> str | None:
    """Return the digest of a folder's weights and config; None where it holds no weights."""
    found = [folder / gguf_file] if gguf_file else []
    for pattern in WEIGHTS:
        found = found or sorted(folder.glob(pattern))
    found = [path for path in found if path.is_file()]
    if not found:
        return None
    digest = hashlib.sha256(json.dumps(_config(folder), sort_keys=True).encode())
    for path in found:
        stat = path.stat()
        piece = _file_digest(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
        digest.update(f"{path.name}:{stat.st_size}:{piece}\n".encode())
    return digest.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {n: v for n, v in fields.items() if n not in VOLATILE} if isinstance(fields, dict) else {}
    )


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, written: int) -> str:
    """Return a digest of a file's content; `written` makes a changed file another entry of the cache."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        if size <= HASHED_BYTES:
            while piece := handle.read(2**22):
                digest.update(piece)
            return digest.hexdigest()
        last = size - PIECE_BYTES
        for i in range(SAMPLES):  # a safetensors file begins with its header
            handle.seek(last * i // (SAMPLES - 1))
            digest.update(handle.read(PIECE_BYTES))
    return digest.hexdigest()
