"""The auxiliary loss that keeps a mixture's experts equally busy (Fedus et al., arXiv 2101.03961, eq. 4 to 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

Batch = dict[str, torch.Tensor]


class RouterLoss:
    """Collects the router's logits of each forward pass and computes the load-balancing loss of its real tokens.

    The models of `transformers` compute it themselves, but count padding where documents are packed, and
    cannot read a mask of blocks. So their own is turned off, and the logits are taken from the routers.
    """

    def __init__(self, model: Any) -> None:
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = plain.config.get_text_config()
        self.coefficient = float(self.config.router_aux_loss_coef)
        self.logits: list[torch.Tensor] = []
        for config in (plain.config, self.config):
            config.output_router_logits = False
        for module, index in _routers(plain):
            module.register_forward_hook(self._collector(index))

    def _collector(self, index: int) -> Any:
        def collect(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                logits = output[index] if isinstance(output, tuple) else output
                self.logits.append(logits.flatten(0, -2))

        return collect

    def begin(self) -> None:
        """Forget the pass before; recomputed layers leave logits behind in the backward pass."""
        self.logits = []

    def __call__(
        self, rows: list[dict[str, np.ndarray]], weights: np.ndarray, batch: Batch
    ) -> torch.Tensor:
        """Return the loss of the pass since `begin`, times its coefficient: a mean over tokens and layers."""
        collected, self.logits = torch.cat(self.logits).float(), []
        real = _real_tokens(rows, weights, batch).to(collected.device)
        count = real.sum().clamp(min=1) * (len(collected) // len(real) or 1)
        if len(collected) % len(real):  # learned tokens stand in front of each row
            real, count = collected.new_ones(len(collected)), collected.new_tensor(len(collected))
        real = real.repeat(len(collected) // len(real)).unsqueeze(-1)
        shares = collected.softmax(-1)
        chosen = shares.topk(self.config.num_experts_per_tok, dim=-1).indices
        busy = functional.one_hot(chosen, shares.shape[-1]).sum(1)
        fractions = (busy * real).sum(0) / count
        means = (shares * real).sum(0) / count
        return self.coefficient * shares.shape[-1] * (fractions * means).sum()


def asks_for_router_loss(model: Any) -> bool:
    """Whether the model's config asks for the auxiliary loss, and its routers can be found."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(plain, "config"):
        return False
    config = plain.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    return bool(asked and getattr(config, "router_aux_loss_coef", 0) and _routers(plain))


def _routers(model: Any) -> list[tuple[Any, int]]:
    """(module, place of the logits in its output) of each router, as the model's class declares them."""
    found: dict[type, int] = {}
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in recorded if isinstance(recorded, list | tuple) else [recorded]:
            if one is not None:
                found[getattr(one, "target_class", one)] = getattr(one, "index", 0)
    return [(m, found[type(m)]) for m in model.modules() if type(m) in found]


def _real_tokens(
    rows: list[dict[str, np.ndarray]], weights: np.ndarray, batch: Batch
) -> torch.Tensor:
    """1 for each token (rows × length,) of a row that counts, 0 for padding."""
    height, width = batch["input_ids"].shape
    if "attention_mask" in batch:
        mask = batch["attention_mask"].float().cpu()
    else:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(width) < lengths[:, None]).float()
    counting = torch.from_numpy(np.asarray(weights, dtype=np.float32)).repeat(height // len(rows))
    return (mask * counting.unsqueeze(-1)).flatten()
