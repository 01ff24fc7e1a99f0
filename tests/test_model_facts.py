"""Sizes of models whose configs name them in unusual ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import own_config
from orchestrator.plan.model_stats import stats_of
from orchestrator.spec import parse_spec

STAGED = {"swin": (96, 12), "swinv2": (96, 12), "segformer": (32, 8), "pvt": (64, 8), "hiera": (96, 24),
          "convnext": (96, 18), "pvt_v2": (32, 8)}  # fmt: skip


def facts(kind: str, auto: str = "AutoModelForImageClassification") -> Any:
    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        return stats_of(getattr(transformers, auto).from_config(config))


@pytest.mark.parametrize("kind", STAGED)
def test_models_in_stages_are_measured_by_their_stages(kind: str) -> None:
    found = facts(kind)
    assert (found.hidden_size, found.layers) == STAGED[kind]
    assert found.heads >= 1
    assert 49 < found.image_tokens < 4000


@pytest.mark.parametrize(
    ("kind", "auto", "hidden"),
    [
        ("clip", "AutoModelForImageClassification", 768),
        ("gemma3", "AutoModelForCausalLM", 2304),
        ("bart", "AutoModelForSeq2SeqLM", 1024),
        ("dots3_note", "AutoModelForCausalLM", None),
    ],
)
def test_the_part_that_reads_rows_is_measured(kind: str, auto: str, hidden: int | None) -> None:
    found = facts(kind, auto)
    assert found.hidden_size == hidden or hidden is None
    assert found.layers > 1


@pytest.mark.parametrize("auto", ["AutoModelForImageClassification", "AutoModelForCTC"])
def test_no_architecture_ends_in_a_traceback(auto: str) -> None:
    measured = 0
    for config_class in getattr(transformers, auto)._model_mapping.keys():  # noqa: SIM118, lazy
        try:
            with torch.device("meta"):
                model = getattr(transformers, auto).from_config(config_class())
        except Exception:  # noqa: BLE001, a default config that transformers itself refuses
            continue
        assert stats_of(model).parameters > 0
        measured += 1
    assert measured > 8


def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    config = {
        "model_type": "made_up",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    spec = parse_spec(
        {
            "name": "x",
            "task": {"type": "causal_lm"},
            "model": {"pretrained": str(tmp_path)},
            "data": {"train": "memory://"},
        }
    )
    with pytest.raises(OrchestratorError, match="auto_map"):
        own_config(spec)
