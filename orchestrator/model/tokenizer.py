"""The job's tokenizer: loaded, set up for its task, checked against the model, and fingerprinted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config, own_config, unavailable
from orchestrator.spec import JobSpec
from orchestrator.tasks.tokenizing import special_text_is_data

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".ot",
)  # fmt: skip
_OF_THE_MODEL = frozenset(
    {
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "orchestrator.json",
        "README.md",
    }
)
"""Files of a model folder that no tokenizer reads."""
_TEMPLATES = "additional_chat_templates"


def load_tokenizer(spec: JobSpec) -> Any:
    """Return the job's tokenizer, set up for its task; None for tasks without text.

    Raises OrchestratorError where it cannot be loaded, or does not suit the task.
    """
    from transformers import AutoTokenizer

    model = spec.model
    if not spec.task.reads_text:
        return None
    source = model.tokenizer or model.pretrained
    extra: dict[str, Any] = {} if model.tokenizer else {"revision": model.revision}
    if model.gguf_file and not model.tokenizer:
        extra["gguf_file"] = model.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise OrchestratorError(unavailable("tokenizer", str(source), error)) from error
    if model.chat_template is not None:
        tokenizer.chat_template = chat_template(model.chat_template)
    adapt_tokenizer(tokenizer, spec, own_config(spec))
    return tokenizer


def adapt_tokenizer(tokenizer: Any, spec: JobSpec, config: Any) -> None:
    """Set a tokenizer up for the job's task, in place; `config`: the model's.

    Raises OrchestratorError where it does not suit the task.
    """
    spec.task.adapt_tokenizer(tokenizer, config)
    if spec.task.text_is_data and not spec.data.parse_special_tokens:
        special_text_is_data(tokenizer)


def chat_template(path: str) -> str:
    """Return the template in a file; raises OrchestratorError where it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OrchestratorError(f"model.chat_template: {path} cannot be read: {error}") from error
    if not text.strip():
        raise OrchestratorError(
            f"model.chat_template: {path} is empty. Name a Jinja chat template."
        )
    return text


def check_tokenizer(spec: JobSpec) -> None:
    """Raise OrchestratorError where the job's tokenizer does not suit its task."""
    load_tokenizer(spec)


def check_tokens(spec: JobSpec, labels: tuple[str, ...], tokenizer: Any, largest_used: int) -> None:
    """Raise OrchestratorError where tokenizer and model do not agree on the tokens.

    `largest_used`: the largest token id of the prepared rows.
    """
    if tokenizer is None:
        return
    config = load_config(spec, labels)
    known = vocabulary_size(config)
    if known is not None and largest_used >= known and not spec.model.resize_embeddings:
        needed = largest_id(tokenizer) + 1
        token = tokenizer.convert_ids_to_tokens(largest_used)
        fix = (
            "Set model.resize_embeddings=true to train new rows for them, or name the model's own tokenizer."
            if spec.model.config is None
            else f"Set model.config.vocab_size to {needed} or more, or name the model's own tokenizer."
        )
        raise OrchestratorError(
            f"the model embeds {known} tokens, and the prepared rows use {token!r} (id {largest_used}): "
            f"the tokenizer has {needed}. {fix}"
        )
    ends = config.eos_token_id if config.is_encoder_decoder else None
    ends = ends if isinstance(ends, list | tuple) else [ends]
    if config.is_encoder_decoder and tokenizer.eos_token_id not in (None, *ends):
        raise OrchestratorError(
            f"model.config.eos_token_id = {ends[0]}, but the tokenizer ends texts with "
            f"{tokenizer.eos_token_id}: the model would never stop writing. Set it to that."
        )


def vocabulary_size(config: Any) -> int | None:
    """Return the number of tokens that a model of this config embeds."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def largest_id(tokenizer: Any) -> int:
    """Return the largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values())


def unembedded(config: Any, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """Return the first token of some texts that a model of this config does not embed, or None."""
    size = vocabulary_size(config)
    if size is None or largest_id(tokenizer) < size:
        return None
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    beyond = next((i for row in ids for i in row if i >= size), None)
    return None if beyond is None else str(tokenizer.convert_ids_to_tokens(beyond))


def tokenizer_fingerprint(spec: JobSpec) -> str:
    """Return what changes when the tokenizer does, "" for tasks without text.

    A hash of the folder's files without the weights, or the hub id with the commit that its revision
    stands for in the cache.
    """
    if not spec.task.reads_text:
        return ""
    own = _own_fingerprint(spec)
    if spec.data.parse_special_tokens:
        own = f"{own} with control tokens"
    if spec.model.chat_template is None:
        return own
    template = hashlib.sha256(chat_template(spec.model.chat_template).encode()).hexdigest()
    return f"{own} with {template}"


def _own_fingerprint(spec: JobSpec) -> str:
    source = Path(spec.model.tokenizer or spec.model.pretrained or "")
    if not source.is_dir():
        revision = None if spec.model.tokenizer else spec.model.revision
        return f"{source}@{_commit(str(source), revision or 'main')}"
    digest = hashlib.sha256()
    for path in _tokenizer_files(source, spec.model.gguf_file):
        found = path.stat()
        digest.update(str(path.relative_to(source)).encode())
        digest.update(_hash(path, found.st_size, found.st_mtime_ns, found.st_ino))
    digest.update(_tokenizer_class(source).encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _hash(path: Path, size: int, changed_ns: int, inode: int) -> bytes:
    """A file is read once per process, until it changes."""
    return hashlib.sha256(path.read_bytes()).digest()


def _tokenizer_files(folder: Path, gguf_file: str | None) -> list[Path]:
    """All files that a tokenizer may read, whatever its kind names them."""
    found = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]
    return sorted(
        path
        for path in found
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _OF_THE_MODEL
        and not path.name.endswith(".index.json")
        and (path.name == gguf_file or path.suffix not in _WEIGHTS)
    )


def _tokenizer_class(folder: Path) -> str:
    """Return the part of a model's config that chooses the tokenizer."""
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return json.dumps([fields.get("tokenizer_class"), fields.get("model_type")])


@lru_cache(maxsize=16)
def _commit(source: str, revision: str) -> str:
    """The commit that a hub revision stands for, as far as the cache or the hub can say; else its name."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    for name in ("tokenizer_config.json", "tokenizer.json", "config.json", "vocab.txt"):
        try:
            path = cached_file(
                source,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):
            continue
        if commit := extract_commit_hash(path, None):
            return str(commit)
    return revision
