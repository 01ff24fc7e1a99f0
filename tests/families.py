"""Tiny models of the most used families, each from its config, with what a checkpoint of it usually holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 64
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
BARTS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5S: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
GPTS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": WIDTHS,
    "roberta": WIDTHS,
    "xlm-roberta": WIDTHS,
    "camembert": WIDTHS,
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "albert": {**WIDTHS, "embedding_size": 16},
    "electra": {**WIDTHS, "embedding_size": 16},
    "deberta": {**WIDTHS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        **WIDTHS, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
    },
    "modernbert": {**WIDTHS, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "mpnet": WIDTHS,
    "xlnet": {
        "vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0,
    },
    "longformer": {**WIDTHS, "attention_window": [4, 4]},
    "big_bird": {**WIDTHS, "attention_type": "original_full"},
    "funnel": {
        "vocab_size": VOCABULARY, "block_sizes": [1, 1], "block_repeats": [1, 1],
        "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
        "num_decoder_layers": 1, "pad_token_id": 0,
        "architectures": ["FunnelModel"],
    },
    "roformer": {**WIDTHS, "embedding_size": 32},
    "bart": BARTS,
    "t5": T5S,
    "gpt2": GPTS,
    "llama": GROUPED,
    "qwen2": GROUPED,
    "mistral": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8},
}  # fmt: skip
"""Model type → fields of its config; all of these are also classifiers of texts."""

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": GROUPED,
    "phi": WIDTHS,
    "phi3": GROUPED,
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 8},
    "olmo2": GROUPED,
    "granite": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
    },
    "deepseek_v3": {
        **GROUPED, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
    "gpt_oss": {
        **GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
    },
    "granitemoehybrid": {
        **GROUPED, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 4, "mamba_n_groups": 1, "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "gpt2": GPTS,
    "gptj": {**GPTS, "rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": WIDTHS,
    "gpt_bigcode": GPTS,
    "bloom": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    },
    "falcon": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "xglm": {
        "vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "biogpt": WIDTHS,
    "mamba": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "rwkv": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
        "context_length": 64, "bos_token_id": 1, "eos_token_id": 2,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
}  # fmt: skip
"""Model type → fields of its config; all of these are causal language models."""


def config_of(model_type: str, fields: dict[str, Any]) -> Any:
    """The config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **fields)


def save(model_type: str, fields: dict[str, Any], folder: Path, auto: str = "AutoModel") -> Path:
    """Write a tiny model with random weights, as `auto` builds it, and return its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config_of(model_type, fields))
    model.save_pretrained(folder)
    return folder
