"""Some cells of the table on two real workers, at ZeRO stages 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from group import plan_of, run_trials

from compat import models, table
from compat.run import STEPS, check, spec_of
from compat.tasks import COMPLETION_TOKENS
from orchestrator.plan import Plan
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.train.export import export_run

STAGES = {
    "DistilBERT, text classification, LoRA": 2,
    "RoBERTa, token classification, LoRA": 3,
    "BERT, question answering, LoRA": 2,
    "BART, text classification, LoRA": 3,
    "GPT-2, text classification, LoRA": 2,
    "Qwen3, causal LM, LoRA": 3,
    "Granite 4, causal LM, LoRA": 2,
    "gpt-oss, causal LM, LoRA": 3,
    "Qwen3-MoE, chat, LoRA": 2,
    "Gemma 2, preference, LoRA": 3,
    "T5, sequence to sequence, LoRA": 3,
    "wav2vec 2.0 large, speech recognition, LoRA": 3,
    "ResNet, image classification, LoRA": 2,
}
"""ZeRO stage by name of cell."""
CELLS = {cell.name: cell for cell in table.CELLS if cell.name in STAGES}


@pytest.fixture(scope="module")
def trained(
    ray: Any, compat_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, dict[str, Any], Path]]:
    """Plan, last evaluation and folder of every cell, all trained in one worker group."""
    assert CELLS.keys() == STAGES.keys()
    plans, folders = {}, {}
    for name, cell in CELLS.items():
        folders[name] = tmp_path_factory.mktemp("cell")
        model = models.build(cell.architecture, compat_models)
        workers = {"resources": {"num_workers": 2}, "zero": {"stage": STAGES[name]}}
        plans[name] = plan_of(spec_of(cell, model, folders[name], **workers))
        Path(plans[name].run_dir).mkdir(parents=True, exist_ok=True)
    results = run_trials(list(plans.values()))
    out = {}
    for (name, plan), result in zip(plans.items(), results, strict=True):
        assert (result["status"], result["step"]) == ("finished", STEPS), result["message"]
        folder = RunFolder(Path(plan.run_dir))
        write_json(folder.plan, plan.model_dump(mode="json"))
        export_run(plan, folder, folder.export, {"best": result["best"]})
        out[name] = (plan, result["last_eval"], folders[name])
    return out


@pytest.mark.parametrize("name", STAGES)
def test_a_cell_works_on_two_workers(
    name: str, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tasks.generation.COMPLETION_TOKENS", COMPLETION_TOKENS)
    plan, last, folder = trained[name]
    assert (plan.num_workers, plan.stage) == (2, STAGES[name])
    check(CELLS[name], plan, last, folder)
