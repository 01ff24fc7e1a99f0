"""The optimizer object that a plan names."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from orchestrator.model.parts import parameter_groups
from orchestrator.plan.plan import Plan
from orchestrator.spec.optimizer import SGD, Adafactor, Adam, AdamW, Lion, RMSProp


def make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The plan's optimizer over the model's trainable parameters, in groups by rate and decay."""
    module, _, name = plan.optimizer_class.rpartition(".")
    optimizer_class = getattr(importlib.import_module(module), name)
    groups = parameter_groups(model, plan.spec, plan.learning_rate)
    made: torch.optim.Optimizer = optimizer_class(groups, **_settings(plan, name))
    return made


def _settings(plan: Plan, name: str) -> dict[str, Any]:
    """What the class takes beside the groups, which hold rate and decay."""
    spec, lr = plan.spec.optimizer, plan.learning_rate
    match spec:
        case AdamW(betas=betas, eps=eps) | Adam(betas=betas, eps=eps):
            decoupled = isinstance(spec, AdamW)
            flags = {
                "FusedAdam": {"adam_w_mode": decoupled},
                "DeepSpeedCPUAdam": {"adamw_mode": decoupled},
            }
            return {"betas": betas, "eps": eps, **flags.get(name, {"fused": True})}
        case SGD(momentum=momentum, nesterov=nesterov):
            return {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        case RMSProp():
            return spec.model_dump(include={"alpha", "eps", "momentum", "centered"})
        case Lion(betas=betas):
            return {"betas": betas}
        case Adafactor():
            fields = {"decay_rate", "clip_threshold", "scale_parameter"}
            # Its own relative steps would override the schedule.
            return {"lr": lr, "relative_step": False, **spec.model_dump(include=fields)}
