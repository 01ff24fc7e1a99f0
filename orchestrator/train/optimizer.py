"""The optimizer object that a plan names."""

from __future__ import annotations

import torch

from orchestrator.model.parts import parameter_groups
from orchestrator.plan.plan import Plan


def make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the plan's optimizer over the model's trainable parameters, in groups by rate and decay."""
    groups = parameter_groups(model, plan.spec, plan.learning_rate)
    return plan.spec.optimizer.build(plan.optimizer_class, groups, plan.learning_rate)
