"""The longest row a model can read: at the limit every model runs, and above it a job is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from orchestrator.errors import OrchestratorError
from orchestrator.model.positions import (
    Positions,
    check_max_length,
    max_length_tokens,
    positions_of,
    text_positions,
)

ANY = tiny.__file__
"""Stands for training rows that are never read."""
NAMED = 24
S: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": NAMED,
}
D: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": NAMED,
    "decoder_start_token_id": 2,
}

LEARNED: dict[str, tuple[dict[str, Any], int]] = {
    "bert": (S, NAMED),
    "roberta": ({**S, "pad_token_id": 1}, NAMED - 2),
    "xlm-roberta": ({**S, "pad_token_id": 1}, NAMED - 2),
    "camembert": ({**S, "pad_token_id": 0}, NAMED - 1),
    "mpnet": (S, NAMED - 2),
    "esm": ({**S, "pad_token_id": 1, "position_embedding_type": "absolute"}, NAMED - 2),
    "electra": (S, NAMED),
    "albert": ({**S, "embedding_size": 16}, NAMED),
    "gpt2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": NAMED}, NAMED),
    "opt": ({**S, "ffn_dim": 32, "word_embed_proj_dim": 32, "pad_token_id": 1}, NAMED),
    "biogpt": ({**S, "pad_token_id": 1}, NAMED),
    "deberta-v2": ({**S, "position_biased_input": True}, NAMED),
    "nystromformer": ({**S, "num_landmarks": 4, "segment_means_seq_len": NAMED}, NAMED),
    "bart": (D, NAMED),
    "mbart": (D, NAMED),
}  # fmt: skip
"""model_type → (config, positions): one more is an index outside the table."""

TRAINED: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (S, NAMED),
    "gpt_neox": (S, NAMED),
    "modernbert": ({**S, "pad_token_id": 0}, NAMED),
}
"""Computed positions: the model runs further, but was not trained for it."""

ENDLESS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4,
           "n_positions": NAMED, "decoder_start_token_id": 0},
    "deberta-v2": {**S, "position_biased_input": False, "relative_attention": True,
                   "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4},
}  # fmt: skip
"""Relative positions."""


def run(kind: str, config: dict[str, Any], length: int) -> None:
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **config))
    ids = torch.arange(length)[None, :] % 50 + 5
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **_decoder(model, ids))


def _decoder(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}


def job(tmp_path: Path, kind: str, config: dict[str, Any], length: Any = "auto") -> Any:
    folder = tmp_path / kind
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    return tiny.job(folder, ANY, tmp_path, data={"max_length_tokens": length})


@pytest.mark.parametrize("kind", LEARNED)
def test_a_model_runs_at_its_limit_and_no_further(tmp_path: Path, kind: str) -> None:
    config, limit = LEARNED[kind]
    assert text_positions(job(tmp_path, kind, config)) == limit
    assert max_length_tokens(job(tmp_path, kind, config)) == limit
    run(kind, config, limit)
    with pytest.raises((IndexError, RuntimeError)):
        run(kind, config, limit + 1)
    check_max_length(job(tmp_path, kind, config, limit))
    with pytest.raises(
        OrchestratorError, match=rf"= {limit + 1} .*data\.max_length_tokens={limit}\b"
    ):
        check_max_length(job(tmp_path, kind, config, limit + 1))


@pytest.mark.parametrize("kind", TRAINED)
def test_positions_that_are_computed_end_where_the_config_says(tmp_path: Path, kind: str) -> None:
    config, limit = TRAINED[kind]
    run(kind, config, limit)
    assert text_positions(job(tmp_path, kind, config)) == limit
    with pytest.raises(OrchestratorError, match=f"max_length_tokens={limit}"):
        check_max_length(job(tmp_path, kind, config, limit + 1))


@pytest.mark.parametrize("kind", ENDLESS)
def test_relative_positions_have_no_end(tmp_path: Path, kind: str) -> None:
    config = ENDLESS[kind]
    assert text_positions(job(tmp_path, kind, config)) is None
    assert max_length_tokens(job(tmp_path, kind, config)) == 512
    check_max_length(job(tmp_path, kind, config, 4 * NAMED))
    run(kind, config, 4 * NAMED)


def test_what_a_decoder_writes_has_a_limit_of_its_own(tmp_path: Path) -> None:
    shape = {k: v for k, v in D.items() if k != "max_position_embeddings"}
    shape |= {
        "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 16,
        "attention_window": 8,
    }
    assert positions_of(transformers.AutoConfig.for_model("led", **shape)) == Positions(32, 16)
    folder = tmp_path / "led"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "led", **shape}))
    for length, fits in ((16, True), (17, False)):
        task = {"type": "seq2seq", "max_target_tokens": length}
        spec = tiny.job(folder, ANY, tmp_path, task=task)
        if fits:
            check_max_length(spec)
            continue
        with pytest.raises(OrchestratorError, match=r"task\.max_target_tokens=16\b"):
            check_max_length(spec)
