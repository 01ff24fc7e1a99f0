"""A teacher's part of the loss: softened outputs, and hidden states through a projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import nn

from orchestrator.data.teacher import PREFIX
from orchestrator.model.layers import LayerOutputs
from orchestrator.model.parts import PROJECTION
from orchestrator.plan.plan import Plan
from orchestrator.tasks.base import Scores

Rows = Sequence[dict[str, np.ndarray]]
SMALLEST = 1e-6
"""Probability of all tokens beyond the stored ones, at least: fp32 knows no smaller difference from 1."""


class Distiller:
    """Adds to the loss what a teacher said of the rows; `rows` carry it as columns.

    Where hidden states are compared, the model gets projections as one more module, so that they are
    trained, sharded and saved with it. They run inside its forward pass, in training only.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        assert plan.spec.distillation is not None
        self.settings, self.kind = plan.spec.distillation, plan.spec.task.soft_targets
        self.pairs, facts = plan.model.hidden_pairs, plan.model
        self.projected: list[torch.Tensor] = []
        if not self.pairs:
            return
        generator = torch.Generator().manual_seed(plan.spec.seed)
        self.projections = nn.ModuleList(
            _drawn(facts.hidden_size, facts.teacher_hidden_size, generator) for _ in self.pairs
        )
        self.outputs = LayerOutputs(model, [mine for mine, _ in self.pairs], "distillation.hidden")
        model.add_module(PROJECTION, self.projections)
        model.register_forward_hook(self._project)

    def _project(self, module: nn.Module, inputs: Any, output: Any) -> None:
        states = [self.outputs.states[mine] for mine, _ in self.pairs]
        self.outputs.states.clear()
        if module.training:
            pairs = zip(self.projections, states, strict=True)
            self.projected = [projection(state) for projection, state in pairs]

    def __call__(
        self, own: torch.Tensor, scores: Scores, rows: Rows, weights: np.ndarray
    ) -> torch.Tensor:
        """What is minimized, summed over targets, where `own` is the task's own loss of the batch.

        `weights` (rows,) is 0 for rows that only fill it.
        """
        settings = self.settings
        real = [row for row, weight in zip(rows, weights, strict=True) if weight > 0]
        away = self._divergence(scores.logits[scores.weights > 0], real)
        total = (1 - settings.alpha) * own + settings.alpha * settings.temperature**2 * away
        if settings.hidden is not None:
            total = total + settings.hidden.weight * self._distance(scores, rows, weights)
        return total

    def _divergence(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Kullback-Leibler, teacher to student, both softened; logits (targets, classes), sum over targets.
        Of numbers the squared difference."""
        student = logits / self.settings.temperature
        match self.kind:
            case "tokens":
                tokens = _column(rows, "tokens", np.int32, student).view(len(student), -1)
                stored = _column(rows, "log_p", np.float32, student).view(len(student), -1)
                theirs = _with_rest(stored)
                ours = _with_rest(student.log_softmax(-1).gather(-1, tokens.long()))
            case "labels":  # of each label and its absence, mean over labels
                teacher = self._teacher_logits(rows, student)
                theirs = torch.stack([functional.logsigmoid(x) for x in (teacher, -teacher)])
                ours = torch.stack([functional.logsigmoid(x) for x in (student, -student)])
                return (theirs.exp() * (theirs - ours)).sum() / student.shape[-1]
            case "number":  # temperature² takes the division by it back
                return (self._teacher_logits(rows, student) - student).square().sum()
            case _:
                theirs = self._teacher_logits(rows, student).log_softmax(-1)
                ours = student.log_softmax(-1)
        return (theirs.exp() * (theirs - ours)).sum()

    def _teacher_logits(self, rows: Rows, student: torch.Tensor) -> torch.Tensor:
        found = _column(rows, "logits", np.float32, student).view_as(student)
        return found / self.settings.temperature

    def _distance(self, scores: Scores, rows: Rows, weights: np.ndarray) -> torch.Tensor:
        """Mean squared difference over features, a row's tokens and pairs of layers; a row counts as often as
        it has targets."""
        projected, self.projected = self.projected, []
        targets = scores.weights.view(len(rows), -1).sum(1)
        total = scores.logits.new_zeros(())
        for (_, theirs), ours in zip(self.pairs, projected, strict=True):
            wanted, there = _padded(rows, weights, f"{PREFIX}hidden_{theirs}", ours)
            squares = (ours.float() - wanted).square().mean(-1) * there
            total = total + (squares.sum(1) / there.sum(1).clamp_min(1) * targets).sum()
        return total / len(self.pairs)


def _drawn(width: int, wanted: int, generator: torch.Generator) -> nn.Linear:
    """A projection that is the same on every rank, and leaves the global random state alone."""
    made = nn.utils.skip_init(nn.Linear, width, wanted)
    nn.init.xavier_uniform_(made.weight, generator=generator)
    nn.init.zeros_(made.bias)
    return made


def _column(rows: Rows, name: str, dtype: Any, like: torch.Tensor) -> torch.Tensor:
    """A stored column of all rows, flat."""
    arrays = [np.zeros(0, dtype), *(row[PREFIX + name] for row in rows)]
    return torch.from_numpy(np.concatenate(arrays)).to(like.device)


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Log probabilities (targets, k) and, as one more, that of everything else."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST)
    return torch.cat([log_p, rest.log()], dim=-1)


def _padded(
    rows: Rows, weights: np.ndarray, name: str, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored states as `like` (rows, tokens, width), 1 where a row that counts has a token (rows, tokens))."""
    states = np.zeros(like.shape, np.float32)
    there = np.zeros(like.shape[:2], np.float32)
    for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        if weight > 0:
            length = len(row["input_ids"])
            states[i, :length] = row[name].reshape(length, -1)
            there[i, :length] = 1
    return torch.from_numpy(states).to(like.device), torch.from_numpy(there).to(like.device)
