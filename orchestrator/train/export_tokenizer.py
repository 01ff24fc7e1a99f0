"""The tokenizer of an exported model: set so that a plain pipeline reads texts as training did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.model.padding import Side, set_tokenizer_padding
from orchestrator.model.positions import text_positions
from orchestrator.model.tokenizer import adapt_tokenizer, load_tokenizer
from orchestrator.plan.plan import Plan
from orchestrator.tasks.tokenizing import control_ids, language_codes

_CONFIG = "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is; others rebuild parts of it from their own idea."""


def export_tokenizer(plan: Plan, folder: Path) -> None:
    """Write the job's tokenizer with its padding, its longest row, and the settings of the task."""
    tokenizer = load_tokenizer(plan.spec)
    _set_up(plan, tokenizer)
    tokenizer.save_pretrained(folder)
    if tokenizer.is_fast and not language_codes(tokenizer) and not _same(tokenizer, folder):
        path = folder / _CONFIG
        fields = json.loads(path.read_text(encoding="utf-8"))
        named = fields.get("tokenizer_class")
        path.write_text(
            json.dumps({**fields, "tokenizer_class": _GENERIC}, indent=2), encoding="utf-8"
        )
        if not _same(tokenizer, folder):
            path.write_text(
                json.dumps({**fields, "tokenizer_class": named}, indent=2), encoding="utf-8"
            )


def load_exported_tokenizer(plan: Plan, folder: Path, config: Any) -> Any:
    """Return the tokenizer of an exported model, set up as it was for training; `config`: the model's.

    Needs nothing but the folder: an export may outlive the model that it began as.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer is None:
        raise OrchestratorError(f"{folder}: holds no tokenizer")
    adapt_tokenizer(tokenizer, plan.spec, config)
    set_tokenizer_padding(tokenizer, plan.pad_token_id, _side(plan))
    return tokenizer


def _set_up(plan: Plan, tokenizer: Any) -> None:
    set_tokenizer_padding(tokenizer, plan.pad_token_id, _side(plan))
    writes = plan.spec.task.writes_on
    longest = text_positions(plan.spec) if writes else plan.max_length_tokens
    if longest is not None:
        tokenizer.model_max_length = longest


def _side(plan: Plan) -> Side:
    return "left" if plan.spec.task.writes_on else plan.padding_side


def _same(tokenizer: Any, folder: Path) -> bool:
    """Whether the folder's tokenizer, loaded as anybody would, reads texts as this one does."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    names = list(control_ids(tokenizer).values())[:50]
    texts = ["a", " a", "A film was great, again.", *names, *(f"a {name} b" for name in names)]
    return bool(
        loaded(texts, verbose=False)["input_ids"] == tokenizer(texts, verbose=False)["input_ids"]
        and loaded.pad_token_id == tokenizer.pad_token_id
        and loaded.padding_side == tokenizer.padding_side
    )
