"""What is minimized: the task's loss, and what regularization makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from orchestrator.plan.plan import Plan
from orchestrator.tasks.base import Scores, SoftTargets
from orchestrator.train.distil import Distiller
from orchestrator.train.noise import EmbeddingHook
from orchestrator.train.router_loss import RouterLoss, asks_for_router_loss

Batch = dict[str, torch.Tensor]


class Objective:
    """From the rows of a micro-batch to loss sums. Draws from the global random state alone.

    Raises OrchestratorError where the model lacks what the job's regularization works on.
    """

    def __init__(self, plan: Plan, model: Any) -> None:
        self.plan, self.settings = plan, plan.spec.regularization
        settings = self.settings
        on_words = ("neftune_alpha", "mixup_alpha") if plan.spec.task.reads_text else ()
        asked = [n for n in on_words if getattr(settings, n) is not None]
        self.hook: EmbeddingHook | None = None
        if asked:
            self.hook = EmbeddingHook(model, settings.neftune_alpha, f"regularization.{asked[0]}")
        self.looks_at_scores = bool(
            settings.label_smoothing
            or settings.r_drop_alpha
            or settings.mixup_alpha
            or plan.class_weights
            or plan.spec.distillation
        )
        self.distiller = Distiller(plan, model) if plan.spec.distillation else None
        self.router = RouterLoss(model) if asks_for_router_loss(model) else None

    def __call__(
        self, engine: Any, rows: list[dict[str, np.ndarray]], weights: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is minimized, the task's own loss), both summed over the targets of `rows`.

        `weights` (rows,) is 0 for rows that only fill the batch.
        """
        plan, task = self.plan, self.plan.spec.task
        batch = plan.collate(rows, weights)
        if self.settings.token_dropout:
            batch["input_ids"] = masked(batch["input_ids"], plan, self.settings.token_dropout)
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        if self.router is not None:
            self.router.begin()
        if not self.looks_at_scores:
            total = task.loss_sum(engine, batch)
            own = total.detach()
        else:
            scores, total, own = self._from_scores(engine, batch)
            if self.distiller is not None:
                total = self.distiller(total, scores, rows, weights)
        if self.router is not None:
            targets = sum(task.targets(row) for row, w in zip(rows, weights, strict=True) if w > 0)
            total = total + targets * self.router(rows, weights, batch)
        return total, own

    def _from_scores(self, engine: Any, batch: Batch) -> tuple[Scores, torch.Tensor, torch.Tensor]:
        """(scores, what is minimized but for a teacher's part, the task's own loss)."""
        alpha = self.settings.r_drop_alpha
        if alpha is not None:
            batch = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
        batch, partner, share = self._mixed(batch)
        scores = self.plan.spec.task.scores(engine, batch)
        losses = self._cross_entropy(scores, scores.labels) * share
        if partner is not None:
            losses = losses + self._cross_entropy(scores, scores.labels[partner]) * (1 - share)
        total = losses.sum()
        if alpha is not None:
            total = total / 2 + alpha * _divergence(scores, self.plan.spec.task.soft_targets)
        return scores, total, self._plain(scores) / (1 if alpha is None else 2)

    def _mixed(self, batch: Batch) -> tuple[Batch, torch.Tensor | None, float]:
        """(batch, partner of each row, share of the row itself), for mixup; else as it was."""
        if self.settings.mixup_alpha is None:
            return batch, None, 1.0
        share = float(np.random.beta(self.settings.mixup_alpha, self.settings.mixup_alpha))
        partner = _partners(batch["weights"])
        if self.hook is None:
            pixels = batch["pixel_values"]
            mixed = share * pixels + (1 - share) * pixels[partner]
            return {**batch, "pixel_values": mixed}, partner, share
        self.hook.mix = (partner, share)
        seen = torch.maximum(batch["attention_mask"], batch["attention_mask"][partner])
        return {**batch, "attention_mask": seen}, partner, share

    def _cross_entropy(self, scores: Scores, labels: torch.Tensor) -> torch.Tensor:
        """Per target, smoothed and weighted by row and class."""
        smoothing, task = self.settings.label_smoothing, self.plan.spec.task
        by_class: torch.Tensor | None = None
        if self.plan.class_weights:
            by_class = torch.tensor(self.plan.class_weights, device=labels.device)
        losses = task.regularized_losses(scores.logits, labels, smoothing, by_class)
        return losses * scores.weights

    def _own(self, scores: Scores, labels: torch.Tensor) -> torch.Tensor:
        """The task's loss per target, weighted by row."""
        return self.plan.spec.task.losses(scores.logits, labels) * scores.weights

    def _plain(self, scores: Scores) -> torch.Tensor:
        """The task's loss of these scores, without smoothing and class weights."""
        with torch.no_grad():
            return self._own(scores, scores.labels).sum()


def _partners(weights: torch.Tensor) -> torch.Tensor:
    """Row number of each row's partner (rows,): rows that count are paired among themselves."""
    partner = torch.arange(len(weights), device=weights.device)
    counting = partner[weights > 0]
    partner[counting] = counting[torch.randperm(len(counting)).to(weights.device)]
    return partner


def _divergence(scores: Scores, kind: SoftTargets | None) -> torch.Tensor:
    """Symmetric KL divergence between the two halves' predictions, summed over targets (R-Drop): the mean over
    labels where each is a yes or no; of numbers the squared difference."""
    weights = scores.weights.chunk(2)[0]
    if kind == "number":
        first, second = scores.logits.chunk(2)
        return ((first - second).square().sum(-1) * weights).sum()
    logits = scores.logits
    if kind == "labels":
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    first, second = functional.log_softmax(logits, dim=-1).chunk(2)
    there = functional.kl_div(first, second, reduction="none", log_target=True).sum(-1)
    back = functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    apart = (there + back) / 2
    if kind == "labels":
        apart = apart.mean(-1)
    return (apart * weights).sum()


def masked(tokens: torch.Tensor, plan: Plan, share: float) -> torch.Tensor:
    """`tokens` (rows, length) with about `share` of those that are not special replaced by the plan's mask token."""
    assert plan.mask_token_id is not None
    hidden = torch.rand(tokens.shape) < share
    hidden &= ~torch.isin(tokens, torch.tensor(plan.special_token_ids))
    return tokens.masked_fill(hidden, plan.mask_token_id)
