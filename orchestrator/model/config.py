"""The model's config and tokenizer, from the hub, a folder or the job file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.spec import JobSpec
from orchestrator.spec.tuning import virtual_tokens

DEFAULT_MAX_LENGTH_TOKENS = 512
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "spiece.model",
)  # fmt: skip


def load_config(spec: JobSpec, labels: tuple[str, ...]) -> Any:
    """The `transformers` config of the job's model, with the task's head and the job's dropout, and
    without LayerDrop.

    Raises OrchestratorError where it cannot be had.
    """
    config = own_config(spec)
    for name, value in spec.task.config_overrides(labels).items():
        setattr(config, name, value)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as T5 and its kin begin
    if spec.model.dropout is not None:
        _set_dropout(config, spec.model.dropout)
    for name in layer_drops(config):
        setattr(config, name, 0.0)
    return config


def own_config(spec: JobSpec) -> Any:
    """The config as its maker wrote it."""
    from transformers import AutoConfig

    model = spec.model
    try:
        if model.config is not None:
            fields = dict(model.config)
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
        return AutoConfig.from_pretrained(model.pretrained or "", revision=model.revision, **extra)
    except (OSError, ValueError) as error:
        raise OrchestratorError(
            _unavailable("model", model.pretrained or "model.config", error)
        ) from error


def dropouts(config: Any) -> dict[str, float]:
    """The config's fields that are a dropout probability (`hidden_dropout_prob`, `resid_pdrop`, …)."""
    return {
        name: float(value)
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop"))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def layer_drops(config: Any) -> dict[str, float]:
    """The config's probabilities above 0 of leaving whole layers out of a training step (LayerDrop: Fan et
    al., arXiv 1909.11556). Workers would leave out different ones, and ZeRO would wait for the rest."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith("layerdrop") and isinstance(value, int | float) and value > 0
    }


def _set_dropout(config: Any, wanted: float | dict[str, float]) -> None:
    """Set all dropouts of the config, or those named; raises OrchestratorError for a name it lacks."""
    known = dropouts(config)
    if not isinstance(wanted, dict):
        if not known:
            raise OrchestratorError(f"model.dropout: {config.model_type} has no dropout. Drop it.")
        wanted = dict.fromkeys(known, wanted)
    unset = [
        n for n, v in config.to_dict().items() if v is None and "dropout" in n
    ]  # falls back to others
    for name, value in wanted.items():
        if name not in (*known, *unset):
            raise OrchestratorError(
                f"model.dropout: {config.model_type} has no {name!r}. "
                f"Its dropouts: {', '.join([*known, *unset]) or 'none'}."
            )
        setattr(config, name, value)


def load_tokenizer(spec: JobSpec) -> Any:
    """The job's tokenizer, None for tasks without text; raises OrchestratorError where it cannot be had."""
    from transformers import AutoTokenizer

    model = spec.model
    if not spec.task.reads_text:
        return None
    source = model.tokenizer or model.pretrained
    extra: dict[str, Any] = {} if model.tokenizer else {"revision": model.revision}
    if model.gguf_file and not model.tokenizer:
        extra["gguf_file"] = model.gguf_file
    try:
        return AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError) as error:
        raise OrchestratorError(_unavailable("tokenizer", str(source), error)) from error


def _unavailable(what: str, source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {what} {source!r} cannot be loaded: {first}\n"
        "  A hub id needs the network (or a filled cache with HF_HUB_OFFLINE=1); a local folder needs config.json."
    )


def max_length_tokens(spec: JobSpec) -> int:
    """Longest row: the job's, or the model's limit, at most 512."""
    if spec.data.max_length_tokens != "auto":
        return spec.data.max_length_tokens  # needs no model: an export may outlive what it began as
    return min(text_positions(spec) or DEFAULT_MAX_LENGTH_TOKENS, DEFAULT_MAX_LENGTH_TOKENS)


def check_max_length(spec: JobSpec) -> None:
    """Raises OrchestratorError where the job's rows may be longer than the model has positions."""
    limit, virtual = text_positions(spec), virtual_tokens(spec.tuning)
    less = f" (less tuning.num_virtual_tokens = {virtual})" if virtual else ""
    if limit is not None and limit < 2:
        raise OrchestratorError(
            f"tuning.num_virtual_tokens = {virtual} leaves no room: the model has {limit + virtual} positions."
        )
    lengths: dict[str, Any] = {
        "data.max_length_tokens": spec.data.max_length_tokens,
        "task.max_target_tokens": getattr(spec.task, "max_target_tokens", "auto"),
    }
    for field, wanted in lengths.items():
        if wanted != "auto" and limit is not None and wanted > limit:
            raise OrchestratorError(
                f"{field} = {wanted} exceeds the model's {limit} positions{less}: set {field}={limit} or less."
            )


def check_tokenizer(spec: JobSpec, labels: tuple[str, ...], tokenizer: Any) -> None:
    """Raises OrchestratorError where tokenizer and model do not speak of the same tokens."""
    if tokenizer is None:
        return
    config = load_config(spec, labels)
    known = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values())
    if known is not None and largest >= known:
        raise OrchestratorError(
            f"model.config.vocab_size = {known} is too small: the tokenizer's ids go up to {largest}. "
            f"Set it to {largest + 1} or more, or name the model's own tokenizer."
        )
    ends = config.eos_token_id if config.is_encoder_decoder else None
    ends = ends if isinstance(ends, list | tuple) else [ends]
    if config.is_encoder_decoder and tokenizer.eos_token_id not in (None, *ends):
        raise OrchestratorError(
            f"model.config.eos_token_id = {ends[0]}, but the tokenizer ends texts with "
            f"{tokenizer.eos_token_id}: the model would never stop writing. Set it to that."
        )


def text_positions(spec: JobSpec) -> int | None:
    """Tokens of a text that the model has positions for; None where its config names no limit."""
    config = raw_config(spec)
    limit = config.get("max_position_embeddings") or config.get("n_positions")  # GPT-2's name
    return int(limit) - virtual_tokens(spec.tuning) if limit else None


def raw_config(spec: JobSpec) -> dict[str, Any]:
    """The fields of the model's config as its maker wrote them."""
    if spec.model.config is not None:
        return spec.model.config
    path = Path(spec.model.pretrained or "") / "config.json"
    if path.is_file() and not spec.model.gguf_file:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    loaded: dict[str, Any] = own_config(spec).to_dict()
    return loaded


def tokenizer_fingerprint(spec: JobSpec) -> str:
    """Changes when the tokenizer does: a hash of its files, or the hub id and revision; "" without one."""
    if not spec.task.reads_text:
        return ""
    source = Path(spec.model.tokenizer or spec.model.pretrained or "")
    if not source.is_dir():
        return f"{source}@{spec.model.revision or 'main'}"
    digest = hashlib.sha256()
    names = [*TOKENIZER_FILES, *([spec.model.gguf_file] if spec.model.gguf_file else [])]
    for name in names:
        if (source / name).is_file():
            digest.update(name.encode())
            digest.update((source / name).read_bytes())
    return digest.hexdigest()
