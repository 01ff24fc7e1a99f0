"""Adam and AdamW."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.optimizers.base import OF_STATE, Implementation, Optimizer, Probability, Rate

Library = Literal["auto", "deepspeed", "torch"]
FUSED, ON_CPU = "deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam"


class _AdamFamily(Optimizer):
    """What the two share: state, and a choice of libraries."""

    decoupled: ClassVar[bool]
    """Weight decay is apart from the gradient."""

    def states_per_element(self, hidden_matrix: bool) -> int:
        """Return 2: the first and the second moment."""
        return 2

    def _choice(
        self, library: Library, torch_class: str, on_gpu: bool, offloaded: bool
    ) -> Implementation:
        on_device = on_gpu and not offloaded
        path, compiler = (FUSED, "nvcc") if on_device else (ON_CPU, "g++")
        if library == "deepspeed":
            return Implementation(path)
        if library == "torch":
            return Implementation(torch_class)
        if on_gpu and shutil.which(compiler) and shutil.which("ninja"):
            return Implementation(path, f"{compiler} and ninja are here to compile it")
        return Implementation(
            torch_class,
            f"{compiler} or ninja is missing here: torch's fused kernel needs no compiler"
            if on_gpu
            else "torch's fused CPU kernel needs no compiler",
        )

    def arguments(self, path: str, lr: float) -> dict[str, Any]:
        """Return betas and eps, and the switch of each library for decoupled decay."""
        switch = {
            FUSED: {"adam_w_mode": self.decoupled},
            ON_CPU: {"adamw_mode": self.decoupled},
        }.get(path, {"fused": True})
        return {**self.model_dump(include={"betas", "eps"}), **switch}


class AdamW(_AdamFamily):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)."""

    decoupled = True
    sources: ClassVar[Mapping[str, str]] = {
        "type": "decoupled decay generalizes better than Adam's: Loshchilov & Hutter, arXiv 1711.05101",
        "betas": "Kingma & Ba, arXiv 1412.6980",
        "weight_decay": "Devlin et al., arXiv 1810.04805, A.2, pre-trained BERT with 0.01",
        "eps": "Kingma & Ba, arXiv 1412.6980",
    }

    type: Annotated[Literal["adamw"], OF_STATE] = "adamw"
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay; norms and biases are left out of it."""
    implementation: Annotated[Library, OF_STATE] = "auto"
    """`deepspeed` takes FusedAdam on a GPU and DeepSpeedCPUAdam for an offloaded optimizer (both compile
    an extension at first use); `auto` does so where a compiler is found, and says which in the plan."""

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return DeepSpeed's class where it can be compiled here, else torch's."""
        return self._choice(self.implementation, "torch.optim.AdamW", on_gpu, offloaded)


class Adam(_AdamFamily):
    """Adam with its weight decay as an L2 penalty in the gradient (Kingma & Ba, arXiv 1412.6980)."""

    decoupled = False
    sources: ClassVar[Mapping[str, str]] = {
        "betas": "Kingma & Ba, arXiv 1412.6980",
        "eps": "Kingma & Ba, arXiv 1412.6980",
        "weight_decay": "none unless asked for: Kingma & Ba, arXiv 1412.6980, have none",
    }

    type: Annotated[Literal["adam"], OF_STATE]
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty added to the gradient, so scaled by the second moment as the gradient is; `adamw` has
    it decoupled. Norms and biases are left out of it."""
    implementation: Annotated[Library, OF_STATE] = "auto"
    """As for `adamw`."""

    def implementation_on(self, on_gpu: bool, offloaded: bool) -> Implementation:
        """Return DeepSpeed's class where it can be compiled here, else torch's."""
        return self._choice(self.implementation, "torch.optim.Adam", on_gpu, offloaded)
