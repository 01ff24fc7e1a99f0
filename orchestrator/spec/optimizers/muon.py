"""Muon for the matrices inside a model, AdamW for all else.

See docs/decisions/0132-muon-is-torchs-and-runs-at-zero-stage-0.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.optimizers.base import (
    OF_STATE,
    DefaultLr,
    Implementation,
    Optimizer,
    Probability,
    Rate,
)

if TYPE_CHECKING:
    import torch


class Muon(Optimizer):
    """Orthogonalized momentum for matrices inside the model (Jordan et al., 2024, kellerjordan.github.io/posts/muon),
    AdamW for embeddings, head, vectors and convolutions.

    Updates have the root mean square of AdamW's, so both take the same `lr` (Liu et al., arXiv 2502.16982).
    Needs whole matrices, so ZeRO stage 0: from stage 1 on the optimizer sees flat pieces of them.
    """

    whole_matrices = "muon orthogonalizes whole matrices"
    sources: ClassVar[Mapping[str, str]] = {
        "momentum": "torch's, and Jordan et al., 2024",
        "ns_steps": "torch's, and Jordan et al., 2024",
        "weight_decay": "torch's, and Liu et al., arXiv 2502.16982",
        "betas": "Kingma & Ba, arXiv 1412.6980",
        "eps": "Kingma & Ba, arXiv 1412.6980",
    }

    type: Annotated[Literal["muon"], OF_STATE]
    momentum: Probability = 0.95
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look-ahead momentum of matrices."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations that orthogonalize an update."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    eps: Rate = 1e-8
    """AdamW's, added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of both; norms and biases are left out of it."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 1, the momentum, for a matrix that Muon moves, and 2 for what AdamW moves."""
        return 1 if hidden_matrix else 2

    def group_settings(self, hidden_matrix: bool) -> dict[str, Any]:
        """Return which of the two moves the group."""
        return {"use_muon": hidden_matrix}

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return torch's class, which has AdamW beside it."""
        return Implementation(
            "torch.optim.Muon", "matrices inside the model; torch.optim.AdamW for all else"
        )

    def build(self, path: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return one optimizer that steps its groups by torch's Muon and torch's AdamW."""
        muon = {
            **self.model_dump(include={"momentum", "nesterov", "ns_steps"}),
            "adjust_lr_fn": "match_rms_adamw",
        }
        adamw = {"betas": self.betas, "eps": self.eps, "fused": True}
        return _muon_with_adamw()(groups, muon, adamw)

    def default_lr(self, adam: DefaultLr, tuning: str) -> DefaultLr:
        """Return AdamW's."""
        return DefaultLr(
            adam.lr,
            "as for AdamW, whose root mean square updates have: Liu et al., arXiv 2502.16982. "
            f"AdamW's: {adam.source}",
        )


@cache
def _muon_with_adamw() -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimizer that steps some groups by Muon and the others by AdamW.

    torch has none. DeepSpeed's `MuonWithAuxAdam` orthogonalizes in another precision on each accelerator, and
    compiles its kernels when it is imported. The class is made here because torch is imported late.
    """
    import torch

    class MuonWithAdamW(torch.optim.Optimizer):
        def __init__(
            self, groups: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]
        ) -> None:
            super().__init__(groups, {})
            self.parts = {
                use_muon: optimizer_class(of_kind, **settings)
                for use_muon, optimizer_class, settings in (
                    (True, torch.optim.Muon, muon),
                    (False, torch.optim.AdamW, adamw),
                )
                if (of_kind := self.groups_of(use_muon))
            }

        def groups_of(self, use_muon: bool) -> list[dict[str, Any]]:
            """Return the groups, which the two share with this optimizer."""
            return [group for group in self.param_groups if group["use_muon"] == use_muon]

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
            """Step both. Groups and state are handed over each time: loading puts others in their place."""
            loss = None if closure is None else closure()
            for use_muon, part in self.parts.items():
                part.param_groups, part.state = self.groups_of(use_muon), self.state
                part.step()
            return loss

    return MuonWithAdamW
