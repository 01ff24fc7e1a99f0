"""The router's auxiliary loss of mixtures of experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.plan import Plan
from orchestrator.spec.regularization import RegularizationSpec
from orchestrator.tasks import CausalLM
from orchestrator.train.objective import Objective

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def mixture(**config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SHAPE, **config))


def rows(*lengths: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": rng.integers(3, 50, n),
            "is_target": np.array([0] + [1] * (n - 1)),
            "doc_lengths": np.array([n]),
        }
        for n in lengths
    ]


def loss_of(
    model: Any, given: list[Any], weights: Any, packing: Any = False
) -> tuple[float, float]:
    """(what is minimized, the task's own loss) of one micro-batch."""
    task = CausalLM.model_validate({"type": "causal_lm", "packing": packing})
    spec = SimpleNamespace(task=task, regularization=RegularizationSpec(), distillation=None)
    plan: Any = SimpleNamespace(spec=spec, class_weights=(), pad_token_id=0, padding_side="right")
    plan.collate = lambda *batch: Plan.collate(plan, *batch)
    total, own = Objective(plan, model)(model, given, np.asarray(weights, np.float32))
    return float(total.detach()), float(own)


def test_the_loss_is_that_of_transformers_times_the_targets() -> None:
    given = rows(9, 9)
    model = mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in given]))
    with torch.no_grad():
        theirs = float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).aux_loss)
    total, own = loss_of(model, given, [1, 1])
    assert total - own == pytest.approx(16 * 0.5 * theirs, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True, "mask"])
def test_padding_and_rows_that_only_fill_do_not_count(packing: Any) -> None:
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    alone, own = loss_of(mixture(**config), rows(9), [1], packing)
    longer = rows(9, 14)
    filled, _ = loss_of(mixture(**config), longer, [1, 0], packing)
    assert filled == pytest.approx(alone, rel=1e-4)
    assert alone > own + 1


def test_no_loss_is_added_unless_the_config_asks_for_it() -> None:
    total, own = loss_of(mixture(router_aux_loss_coef=0.5), rows(9), [1])
    assert total == own


def test_the_routers_are_trained_by_it() -> None:
    model = mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    plain = mixture(router_aux_loss_coef=0.5)
    gradients = []
    for one in (model, plain):
        task = CausalLM(type="causal_lm", packing=False)
        spec = SimpleNamespace(task=task, regularization=RegularizationSpec(), distillation=None)
        plan: Any = SimpleNamespace(
            spec=spec, class_weights=(), pad_token_id=0, padding_side="right"
        )
        plan.collate = lambda *batch, plan=plan: Plan.collate(plan, *batch)
        total, _ = Objective(plan, one)(one, rows(9), np.ones(1, np.float32))
        total.backward()
        gate = next(p for name, p in one.named_parameters() if "gate.weight" in name)
        gradients.append(gate.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)
