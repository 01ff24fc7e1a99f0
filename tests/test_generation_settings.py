"""A checkpoint's settings of length and repetition shape nothing that is measured, unless the job keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from orchestrator.model.build import build_model
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan.warnings import generation_warnings
from orchestrator.spec import JobSpec

SETTINGS = {"min_length": 30, "no_repeat_ngram_size": 2, "length_penalty": 2.0, "num_beams": 4}


@pytest.fixture(params=["generation_config.json", "config.json"])
def summarizer(request: Any, models: tiny.Tiny, tmp_path: Path) -> Path:
    """A T5 whose settings stand where checkpoints have them."""
    folder = tmp_path / "t5"
    shutil.copytree(models.t5, folder)
    if request.param == "config.json":
        (folder / "generation_config.json").unlink(missing_ok=True)
    file = folder / request.param
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**held, **SETTINGS}))
    return folder


def job(folder: Path, keep: bool, tmp_path: Path) -> JobSpec:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"source": "good", "target": "bad"}] * 4)
    task = {"type": "seq2seq", "max_target_tokens": 40, "keep_generation_settings": keep}
    return tiny.job(folder, rows, tmp_path, task=task)


@pytest.mark.parametrize("keep", [False, True])
def test_evaluations_write_without_the_checkpoints_settings(
    summarizer: Path, tmp_path: Path, keep: bool
) -> None:
    spec = job(summarizer, keep, tmp_path)
    (said,) = generation_warnings(spec)
    assert "min_length = 30" in said
    assert ("set aside" in said) != keep
    model: Any = build_model(spec, ()).eval()
    assert (model.generation_config.min_length == 30) == keep
    assert (model.generation_config.no_repeat_ngram_size == 2) == keep
    end = model.config.eos_token_id
    with_end = np.zeros(model.config.vocab_size, dtype=np.float32)
    with_end[end] = 1e4  # a model that has nothing to say
    import torch

    model.lm_head.register_forward_hook(lambda _, __, logits: logits + torch.from_numpy(with_end))
    (encoded,) = spec.task.encode(
        [{"source": "good", "target": "bad"}], load_tokenizer(spec), 32, ()
    )
    row = {name: np.array(encoded[name]) for name in ("input_ids", "label_ids")}  # type: ignore[index]
    with torch.no_grad():
        measured = spec.task.measure(model, spec.task.collate([row], np.ones(1), 0))
    written = measured["written"][0]
    assert (len(written) > 25) == keep
    model.save_pretrained(tmp_path / "export")
    exported = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert ("min_length" in exported) == keep


def test_a_checkpoint_without_settings_is_not_mentioned(models: tiny.Tiny, tmp_path: Path) -> None:
    assert not list(generation_warnings(job(models.t5, False, tmp_path)))
