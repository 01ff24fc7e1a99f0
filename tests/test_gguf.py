"""A GGUF as base model: its weights are dequantized on load, train, and are those that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from orchestrator.model.build import build_model
from orchestrator.plan.model_stats import model_stats
from orchestrator.spec import JobSpec

gguf = pytest.importorskip("gguf")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Llama's names of a layer's parts in transformers → in a GGUF."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Any, path: Path, kind: Any) -> None:
    """A Llama as llama.cpp keeps it: matrices in blocks of `kind`, queries and keys in its order of rows."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        used = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """A parameter's name in a GGUF."""
    whole = name.removesuffix(".weight")
    if whole in OUTSIDE:
        return f"{OUTSIDE[whole]}.weight"
    _, _, layer, part = whole.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


@pytest.mark.parametrize(("kind", "off"), [("F32", 0.0), ("Q8_0", 0.01)])
def test_a_gguf_is_loaded_in_fp32_and_trains(
    models: tiny.Tiny, tmp_path: Path, kind: str, off: float
) -> None:
    written = AutoModelForCausalLM.from_pretrained(models.llama)
    write_gguf(written, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.documents(4))
    spec: JobSpec = tiny.job(
        tmp_path, rows, tmp_path, task={"type": "causal_lm"}, data={"max_length_tokens": 32},
        model={"gguf_file": "tiny.gguf", "tokenizer": str(models.llama)},
    )  # fmt: skip
    model: Any = build_model(spec, ())
    theirs = written.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        largest = float(theirs[name].abs().max())
        assert float((tensor - theirs[name]).abs().max()) <= off * largest, name
    assert model_stats(spec, ()).parameters == sum(p.numel() for p in written.parameters())
    batch = torch.arange(8, 20)[None]
    model(input_ids=batch, labels=batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
