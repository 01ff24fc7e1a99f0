"""Rows of a model's embedding for tokens that the tokenizer has and the model lacks."""

from __future__ import annotations

from typing import Any

from orchestrator.model.tokenizer import largest_id, load_tokenizer
from orchestrator.spec import JobSpec


def resize_embeddings(model: Any, spec: JobSpec, on_meta: bool = False) -> None:
    """Give every token of the tokenizer a row, where `model.resize_embeddings` asks for it.

    New rows are drawn close to the mean of the others, so that at first they are neither likelier nor
    rarer than an average token; the model's config follows.
    """
    if not spec.model.resize_embeddings:
        return
    needed = largest_id(load_tokenizer(spec)) + 1
    if model.get_input_embeddings().num_embeddings < needed:
        model.resize_token_embeddings(needed, mean_resizing=not on_meta)
