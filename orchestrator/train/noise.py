"""Noise and mixing on the token embeddings, through a hook on each module that looks tokens up."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.errors import OrchestratorError


class EmbeddingHook:
    """Changes what a model's token embeddings give while it trains; nothing in evaluation.

    `mix`: (partner of each row, share of the row itself), set before a forward pass and used by it.
    Raises OrchestratorError where the model has no token embeddings.
    """

    def __init__(self, model: Any, neftune_alpha: float | None, asked_by: str) -> None:
        try:
            embeddings = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embeddings = None
        if not isinstance(embeddings, torch.nn.Embedding):
            raise OrchestratorError(
                f"{asked_by}: {model.config.model_type} has no token embeddings to work on. Drop it."
            )
        self.neftune_alpha = neftune_alpha
        self.mix: tuple[torch.Tensor, float] | None = None
        for (
            module
        ) in model.modules():  # T5's and BART's encoder and decoder have one each, of one weight
            if isinstance(module, torch.nn.Embedding) and module.weight is embeddings.weight:
                module.register_forward_hook(self._change)

    def _change(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        if self.mix is not None:
            partner, share = self.mix
            output = share * output + (1 - share) * output[partner]
        if self.neftune_alpha is not None:
            output = output + neftune_noise(output, self.neftune_alpha)
        return output


def neftune_noise(embedded: torch.Tensor, alpha: float) -> torch.Tensor:
    """Uniform noise in ± alpha / √(tokens × width), as of `embedded` (rows, tokens, width).

    Jain et al., arXiv 2310.05914, algorithm 1; tokens are those of the longest row.
    """
    size = alpha / (embedded.shape[-2] * embedded.shape[-1]) ** 0.5
    return torch.empty_like(embedded).uniform_(-size, size)
