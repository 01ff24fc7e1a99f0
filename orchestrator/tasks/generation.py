"""Text that a model writes."""

from __future__ import annotations

from typing import Any

from orchestrator.tasks.templating import prompt_ids

COMPLETION_TOKENS = 64
"""Longest completion of a prompt."""


def in_step_with_others() -> bool:
    """Tell whether other ranks write texts at the same time: all then make equally many forward passes,
    which ZeRO-3 needs to gather weights."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def complete(model: Any, tokenizer: Any, prompt: Any, as_chat: bool, tools: Any = None) -> str:
    """Return what the model writes after the prompt, greedily; as an assistant's turn if `as_chat`.

    The prompt is a text, or a list of messages where `as_chat`; `tools` are those on offer.
    """
    import torch

    inputs = prompt_ids(prompt, as_chat, tokenizer, tools).to(model.device)
    with torch.no_grad():
        tokens = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=COMPLETION_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    text: str = tokenizer.decode(tokens[0, inputs.shape[1] :], skip_special_tokens=True)
    return text
