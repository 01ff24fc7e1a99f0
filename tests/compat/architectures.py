"""The architectures of the table, as their checkpoints come but for their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MASKED, CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"
SEQ2SEQ, IMAGE, BODY = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModel"


@dataclass(frozen=True)
class Architecture:
    """A model as its checkpoints come: config, tokenizer or processor, and the head they have."""

    name: str
    family: str
    model_type: str
    config: Mapping[str, Any]
    tokenizer: str = ""
    """A name in `models.TOKENIZERS`; empty for images and sound."""
    auto: str = MASKED
    processor: Mapping[str, Any] | None = None
    """The checkpoint's `preprocessor_config.json`."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the task that a job for this model sets."""


S: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
"""The usual names of a transformer's sizes."""
L: dict[str, Any] = {**S, "num_key_value_heads": 2}
"""Those of a decoder with grouped attention."""
D: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
}
"""Those of BART and its kin."""
OFFSET = 258
"""Positions of a RoBERTa for 256 tokens: two stand for padding."""


def _encoder(
    name: str, model_type: str, tokenizer: str, config: Mapping[str, Any] = S, **more: Any
) -> Architecture:
    return Architecture(name, "encoder", model_type, config, tokenizer, **more)


def _decoder(
    name: str, model_type: str, tokenizer: str, config: Mapping[str, Any] = L
) -> Architecture:
    return Architecture(name, "decoder", model_type, config, tokenizer, CAUSAL)


def _seq2seq(
    name: str, model_type: str, tokenizer: str, config: Mapping[str, Any], **more: Any
) -> Architecture:
    return Architecture(name, "encoder-decoder", model_type, config, tokenizer, SEQ2SEQ, **more)


BERT = _encoder("BERT", "bert", "wordpiece")
ROBERTA = _encoder(
    "RoBERTa", "roberta", "roberta", {**S, "max_position_embeddings": OFFSET, "type_vocab_size": 1}
)
DISTILBERT = _encoder(
    "DistilBERT", "distilbert", "wordpiece",
    {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 256},
)  # fmt: skip
ALBERT = _encoder("ALBERT", "albert", "albert", {**S, "embedding_size": 16})
ELECTRA = _encoder("ELECTRA", "electra", "wordpiece", {**S, "embedding_size": 16})
DEBERTA = _encoder(
    "DeBERTa v3", "deberta-v2", "deberta_v2",
    {**S, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
     "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0, "position_biased_input": False},
)  # fmt: skip
MODERNBERT = _encoder(
    "ModernBERT", "modernbert", "wordpiece",
    {**S, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
)  # fmt: skip
XLNET = _encoder(
    "XLNet",
    "xlnet",
    "xlnet",
    {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    auto=CAUSAL,
)
MPNET = _encoder("MPNet", "mpnet", "mpnet", {**S, "max_position_embeddings": OFFSET})
CAMEMBERT = _encoder(
    "CamemBERT", "camembert", "camembert", {**S, "max_position_embeddings": OFFSET}
)
XLMR = _encoder("XLM-R", "xlm-roberta", "xlm_roberta", {**S, "max_position_embeddings": OFFSET})
LONGFORMER = _encoder(
    "Longformer",
    "longformer",
    "roberta",
    {**S, "max_position_embeddings": OFFSET, "attention_window": [8, 8]},
)
BIGBIRD = _encoder("BigBird", "big_bird", "big_bird", {**S, "attention_type": "original_full"})
FUNNEL = _encoder(
    "Funnel", "funnel", "funnel",
    {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1},
)  # fmt: skip

GPT2 = _decoder(
    "GPT-2", "gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
)
LLAMA = _decoder("Llama", "llama", "llama")
LLAMA3 = _decoder("Llama 3", "llama", "chat")
QWEN2 = _decoder("Qwen2", "qwen2", "qwen")
QWEN3 = _decoder("Qwen3", "qwen3", "qwen", {**L, "head_dim": 8, "tie_word_embeddings": True})
QWEN3_MOE = _decoder(
    "Qwen3-MoE", "qwen3_moe", "qwen",
    {**L, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)  # fmt: skip
QWEN3_NEXT = _decoder(
    "Qwen3-Next", "qwen3_next", "qwen",
    {**L, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
     "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
     "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
)  # fmt: skip
MISTRAL = _decoder("Mistral", "mistral", "llama", {**L, "sliding_window": 16})
MIXTRAL = _decoder(
    "Mixtral", "mixtral", "llama", {**L, "num_local_experts": 4, "output_router_logits": True}
)
GEMMA = _decoder("Gemma", "gemma", "gemma", {**L, "head_dim": 8})
GEMMA2 = _decoder("Gemma 2", "gemma2", "gemma", {**L, "head_dim": 8, "sliding_window": 16})
GEMMA3 = _decoder(
    "Gemma 3", "gemma3_text", "gemma",
    {**L, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
)  # fmt: skip
PHI = _decoder("Phi", "phi", "gpt2")
PHI3 = _decoder("Phi-3", "phi3", "chat")
OLMO2 = _decoder("OLMo 2", "olmo2", "chat")
GRANITE = _decoder("Granite", "granite", "chat")
GRANITE4 = _decoder(
    "Granite 4", "granitemoehybrid", "chat",
    {**L, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4,
     "mamba_n_groups": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32},
)  # fmt: skip
GPT_NEOX = _decoder("GPT-NeoX", "gpt_neox", "gpt2", S)
GPTJ = _decoder(
    "GPT-J",
    "gptj",
    "gpt2",
    {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
)
GPT_NEO = _decoder(
    "GPT-Neo", "gpt_neo", "gpt2",
    {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
     "window_size": 16, "max_position_embeddings": 256},
)  # fmt: skip
BLOOM = _decoder("BLOOM", "bloom", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4})
FALCON = _decoder(
    "Falcon",
    "falcon",
    "gpt2",
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
)
OPT = _decoder(
    "OPT", "opt", "opt",
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
     "max_position_embeddings": 256, "word_embed_proj_dim": 32},
)  # fmt: skip
XGLM = _decoder(
    "XGLM", "xglm", "xglm",
    {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 256},
)  # fmt: skip
BIOGPT = _decoder("BioGPT", "biogpt", "opt", S)
GPT_OSS = _decoder(
    "gpt-oss", "gpt_oss", "chat",
    {**L, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
)  # fmt: skip
STABLELM = _decoder("StableLM", "stablelm", "gpt2")
COHERE = _decoder("Cohere", "cohere", "chat")
DEEPSEEK_V3 = _decoder(
    "DeepSeek-V3", "deepseek_v3", "chat",
    {**S, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
     "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
     "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
)  # fmt: skip
SMOLLM3 = _decoder("SmolLM3", "smollm3", "chat")
STARCODER2 = _decoder("StarCoder2", "starcoder2", "gpt2")
MPT = _decoder(
    "MPT", "mpt", "gpt2", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}
)
MAMBA = _decoder(
    "Mamba", "mamba", "gpt2", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
)
LFM2 = _decoder(
    "LFM2",
    "lfm2",
    "chat",
    {**L, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
)

T5 = _seq2seq(
    "T5", "t5", "t5",
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
)  # fmt: skip
MT5 = _seq2seq(
    "mT5", "mt5", "t5",
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
     "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
)  # fmt: skip
BART = _seq2seq(
    "BART", "bart", "roberta", {**D, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
)
MBART = _seq2seq(
    "mBART-50",
    "mbart",
    "mbart50",
    {**D, "decoder_start_token_id": 2},
    task={"source_language": "en_XX", "target_language": "de_DE"},
)
PEGASUS = _seq2seq("Pegasus", "pegasus", "pegasus", {**D, "decoder_start_token_id": 0})
MARIAN = _seq2seq("Marian", "marian", "t5", {**D, "decoder_start_token_id": 0})
LED = _seq2seq(
    "LED", "led", "roberta",
    {**{k: v for k, v in D.items() if k != "max_position_embeddings"}, "max_encoder_position_embeddings": 256,
     "max_decoder_position_embeddings": 256, "attention_window": [8, 8], "decoder_start_token_id": 2},
)  # fmt: skip

SIDE = 32
"""Height and width of the images in pixels."""
NORMALIZED = {
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


def _image(
    name: str, model_type: str, kind: str, config: Mapping[str, Any], **processor: Any
) -> Architecture:
    """`kind`: class of the image processor. `processor`: its fields where they differ from NORMALIZED."""
    return Architecture(
        name, "image", model_type, config, auto=IMAGE,
        processor={"image_processor_type": kind, **NORMALIZED, **processor},
    )  # fmt: skip


VIT_SHAPE = {**S, "image_size": SIDE, "patch_size": 8}
VIT_SHAPE.pop("max_position_embeddings")
STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1]}
VIT = _image("ViT", "vit", "ViTImageProcessor", VIT_SHAPE)
DEIT = _image("DeiT", "deit", "DeiTImageProcessor", VIT_SHAPE, do_center_crop=False)
BEIT = _image(
    "BEiT", "beit", "BeitImageProcessor", {**VIT_SHAPE, "use_relative_position_bias": True}
)
SWIN = _image(
    "Swin", "swin", "ViTImageProcessor",
    {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
)  # fmt: skip
CONVNEXT = _image("ConvNeXt", "convnext", "ConvNextImageProcessor", {"num_stages": 2, "image_size": SIDE, **STAGES},
                  size={"shortest_edge": SIDE}, crop_pct=1.0)  # fmt: skip
SEGFORMER = _image(
    "SegFormer", "segformer", "SegformerImageProcessor",
    {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
     "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
)  # fmt: skip
PVT = _image(
    "PVT", "pvt", "PvtImageProcessor",
    {"image_size": SIDE, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32],
     "num_attention_heads": [2, 4], "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2],
     "mlp_ratios": [2, 2]},
)  # fmt: skip
DINOV2 = _image(
    "DINOv2", "dinov2", "BitImageProcessor", {**VIT_SHAPE, "mlp_ratio": 2}, do_center_crop=False
)
RESNET = _image(
    "ResNet", "resnet", "ConvNextImageProcessor", {"embedding_size": 16, "layer_type": "basic", **STAGES},
    size={"shortest_edge": SIDE}, crop_pct=1.0,
)  # fmt: skip
MOBILENET = _image("MobileNet V2", "mobilenet_v2", "MobileNetV2ImageProcessor",
                   {"image_size": SIDE, "depth_multiplier": 0.25}, do_center_crop=False)  # fmt: skip
EFFICIENTNET = _image(
    "EfficientNet", "efficientnet", "EfficientNetImageProcessor",
    {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320,
     "in_channels": [16, 24], "out_channels": [24, 32], "kernel_sizes": [3, 3], "strides": [1, 2],
     "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": []},
)  # fmt: skip
REGNET = _image(
    "RegNet", "regnet", "ConvNextImageProcessor", {"embedding_size": 16, "groups_width": 8, **STAGES},
    size={"shortest_edge": SIDE}, crop_pct=1.0,
)  # fmt: skip
MOBILEVIT = _image(
    "MobileViT", "mobilevit", "MobileViTImageProcessor",
    {"image_size": SIDE, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
     "num_attention_heads": 2},
    do_center_crop=False, do_flip_channel_order=False,
)  # fmt: skip
LEVIT = _image(
    "LeViT", "levit", "LevitImageProcessor",
    {"image_size": SIDE, "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "depths": [1, 1],
     "key_dim": [8, 8], "drop_path_rate": 0, "mlp_ratio": [2, 2], "attention_ratio": [2, 2],
     "down_ops": [["Subsample", 8, 2, 4, 2, 2], [""]]},
    do_center_crop=False,
)  # fmt: skip

WAVE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip
SOUND = {"sampling_rate_hz": 1000, "frame_samples": 20}


def _speech(
    name: str, model_type: str, config: Mapping[str, Any] = WAVE, group: bool = False
) -> Architecture:
    processor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 1000,
        "padding_value": 0.0,
        "do_normalize": True,
        "return_attention_mask": not group,
    }
    norm = {"feat_extract_norm": "group" if group else "layer"}
    return Architecture(
        name, "speech", model_type, {**config, **norm}, auto=BODY, processor=processor, task=SOUND
    )


WAV2VEC2 = _speech("wav2vec 2.0 large", "wav2vec2")
WAV2VEC2_GROUP = _speech("wav2vec 2.0 base", "wav2vec2", group=True)
HUBERT = _speech("HuBERT large", "hubert")
WAVLM = _speech("WavLM large", "wavlm")
WHISPER = Architecture(
    "Whisper", "speech", "whisper",
    {**{k: v for k, v in D.items() if k != "max_position_embeddings"}, "num_mel_bins": 8,
     "max_source_positions": 16, "max_target_positions": 16, "vocab_size": 64, "pad_token_id": 1,
     "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None,
     "begin_suppress_tokens": None},
    auto="AutoModelForSpeechSeq2Seq", task=SOUND,
)  # fmt: skip
