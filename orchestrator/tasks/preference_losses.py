"""Losses of preference tuning. Each is a kind that says what it rewards and whether it needs a reference."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, Tag

from orchestrator.tasks.default_lr import DPO_TUNED, Rate
from orchestrator.values import Frozen, by_type

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of a batch's answers; row 0 of each tensor is for chosen answers, row 1 for rejected ones.

    `total` (2, rows): summed over an answer's tokens, fp32. `tokens` (2, rows): their number.
    `reference` (2, rows): `total` of the untouched model; zeros where the loss needs none.
    """

    total: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean over an answer's tokens (2, rows)."""
        return self.total / self.tokens


class PreferenceLoss(Frozen):
    """Base of the losses."""

    type: str
    needs_reference: ClassVar[bool] = False
    """The untouched model's likelihoods are part of the loss."""
    tuned_lr: ClassVar[Rate] = DPO_TUNED[""]
    """Default learning rate of full tuning."""
    sources: ClassVar[Mapping[str, str]] = {}
    """Field → citation of its default."""

    @abstractmethod
    def rewards(self, answers: Likelihoods) -> torch.Tensor:
        """Return the implicit reward of each answer (2, rows)."""

    @abstractmethod
    def losses(self, answers: Likelihoods) -> torch.Tensor:
        """Return the loss of each pair (rows,)."""

    def margins(self, answers: Likelihoods) -> torch.Tensor:
        """Return the reward of the chosen answer minus that of the rejected one (rows,)."""
        chosen, rejected = self.rewards(answers)
        return chosen - rejected


class DPO(PreferenceLoss):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7)."""

    needs_reference: ClassVar[bool] = True
    sources: ClassVar[Mapping[str, str]] = {
        "beta": "Rafailov et al., arXiv 2305.18290, B",
        "label_smoothing": "none: plain DPO, Rafailov et al., arXiv 2305.18290, eq. 7",
    }

    type: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull to the reference; a reward is beta × the log ratio of model and reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are assumed to be labeled the wrong way round (conservative DPO, Mitchell 2023)."""

    def rewards(self, answers: Likelihoods) -> torch.Tensor:
        """Return beta × the log ratio of model and reference (2, rows)."""
        return self.beta * (answers.total - answers.reference)

    def losses(self, answers: Likelihoods) -> torch.Tensor:
        """Return the negative log-likelihood of the preference (rows,)."""
        import torch.nn.functional as functional

        margin, wrong = self.margins(answers), self.label_smoothing
        return -(1 - wrong) * functional.logsigmoid(margin) - wrong * functional.logsigmoid(-margin)


class IPO(PreferenceLoss):
    """Identity preference optimization (Azar et al., arXiv 2310.12036, eq. 17), on means over tokens.

    A pair's log ratio is pulled to 1 / (2 beta) and no further, so that pairs without noise do not drive it to
    infinity.
    """

    needs_reference: ClassVar[bool] = True
    sources: ClassVar[Mapping[str, str]] = {
        "beta": "the reference's weight in Azar et al., arXiv 2310.12036, 5"
    }

    type: Literal["ipo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull to the reference (the paper's τ)."""

    def rewards(self, answers: Likelihoods) -> torch.Tensor:
        """Return beta × the mean log ratio of model and reference (2, rows)."""
        return self.beta * (answers.total - answers.reference) / answers.tokens

    def losses(self, answers: Likelihoods) -> torch.Tensor:
        """Return the squared distance of the log ratio from its target (rows,)."""
        return (self.margins(answers) / self.beta - 1 / (2 * self.beta)) ** 2


class SimPO(PreferenceLoss):
    """Simple preference optimization (Meng et al., arXiv 2405.14734, eq. 6): mean likelihoods, no reference."""

    sources: ClassVar[Mapping[str, str]] = {
        "beta": "Meng et al., arXiv 2405.14734, tuned 2.0 to 2.5",
        "gamma": "torchtune's default; Meng et al., arXiv 2405.14734, search its ratio to beta",
    }

    type: Literal["simpo"]
    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the rewards, which are beta × the mean log-likelihood of a token."""
    gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin by which the chosen answer's reward should exceed the other's."""

    def rewards(self, answers: Likelihoods) -> torch.Tensor:
        """Return beta × the mean log-likelihood (2, rows)."""
        return self.beta * answers.mean

    def losses(self, answers: Likelihoods) -> torch.Tensor:
        """Return the negative log-likelihood of a margin above gamma (rows,)."""
        import torch.nn.functional as functional

        return -functional.logsigmoid(self.margins(answers) - self.gamma)


class ORPO(PreferenceLoss):
    """Odds ratio preference optimization (Hong et al., arXiv 2403.07691, eq. 6 and 7): no reference.

    The chosen answer is learned as in supervised tuning, and the odds ratio to the rejected one is a penalty.
    """

    tuned_lr: ClassVar[Rate] = Rate(8e-6, "Hong et al., arXiv 2403.07691, tuned at 8e-6")
    sources: ClassVar[Mapping[str, str]] = {"beta": "Hong et al., arXiv 2403.07691, used 0.1"}

    type: Literal["orpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds ratio (the paper's λ)."""

    def rewards(self, answers: Likelihoods) -> torch.Tensor:
        """Return beta × the mean log-likelihood (2, rows)."""
        return self.beta * answers.mean

    def losses(self, answers: Likelihoods) -> torch.Tensor:
        """Return the chosen answer's mean negative log-likelihood and the weighted odds ratio, summed (rows,)."""
        import torch
        import torch.nn.functional as functional

        mean = answers.mean
        odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))
        return -mean[0] - self.beta * functional.logsigmoid(odds[0] - odds[1])


PreferenceLossSpec = Annotated[
    Annotated[DPO, Tag("dpo")]
    | Annotated[IPO, Tag("ipo")]
    | Annotated[SimPO, Tag("simpo")]
    | Annotated[ORPO, Tag("orpo")],
    by_type("dpo"),
]
