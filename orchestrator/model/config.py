"""The model's config, from the hub, a folder or the job file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.product import install_hint
from orchestrator.spec import JobSpec


def load_config(spec: JobSpec, labels: tuple[str, ...]) -> Any:
    """The `transformers` config of the job's model, with the task's head and the job's dropout, and
    without LayerDrop.

    Raises OrchestratorError where it cannot be had.
    """
    config = own_config(spec)
    for name, value in spec.task.config_overrides(labels).items():
        setattr(config, name, value)
    for part in (config, config.get_text_config()):
        _drop_impossible_padding(part)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as T5 and its kin begin
    if spec.model.dropout is not None:
        _set_dropout(config, spec.model.dropout)
    for name in layer_drops(config):
        setattr(config, name, 0.0)
    return config


def _drop_impossible_padding(config: Any) -> None:
    """Forget a padding token outside the vocabulary, such as the -1 of the first Llama."""
    padding, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(padding, int) and size is not None and not 0 <= padding < size:
        config.pad_token_id = None


@contextmanager
def naming_packages() -> Iterator[None]:
    """Turn a package that `transformers` lacks for a model into an OrchestratorError with the command for it."""
    try:
        yield
    except ImportError as error:
        first = " ".join(str(error).split()).split(". ")[0]
        raise OrchestratorError(
            f"model: {first}. timm's models need timm, and torchvision built for the same torch: "
            f"{install_hint('timm')}, here and on the cluster."
        ) from error


def own_config(spec: JobSpec) -> Any:
    """The config as its maker wrote it."""
    from transformers import AutoConfig

    model = spec.model
    try:
        with naming_packages():
            if model.config is not None:
                fields = dict(model.config)
                made = AutoConfig.for_model(fields.pop("model_type"), **fields)
                made.architectures = made.architectures or []  # auto classes read it as a list
                return made
            extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
            return AutoConfig.from_pretrained(
                model.pretrained or "", revision=model.revision, trust_remote_code=False, **extra
            )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise OrchestratorError(
                f"model.pretrained = {model.pretrained!r}: brings Python code of its own (auto_map in config.json), "
                "which is never run. Choose a model whose model_type transformers has built in."
            ) from error
        raise OrchestratorError(
            unavailable("model", model.pretrained or "model.config", error)
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


def unavailable(what: str, source: str, error: Exception) -> str:
    """Return the message for a model or tokenizer that cannot be loaded."""
    if "trust_remote_code" in str(error):
        return (
            f"the {what} {source!r} brings Python code of its own (auto_map in its config), which is never run. "
            "Name one whose architecture transformers has: model.pretrained=…"
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    first = first.split(" Should contain one of ")[0]  # several hundred names
    return (
        f"the {what} {source!r} cannot be loaded: {first}\n"
        "  A hub id needs the network (or a filled cache with HF_HUB_OFFLINE=1); a local folder needs config.json."
    )


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
