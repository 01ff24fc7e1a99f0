"""Tiny tokenizers of the kinds that models come with; all made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("great", "film", "the", "was", "hello", "world", "hallo", "welt")
PIECES = [("▁" + word, -1.0) for word in WORDS] + [(c, -2.0) for c in f"{LETTERS}▁</>_"]


def roberta() -> Any:
    """A byte-level BPE framed by `<s> … </s>`, whose words keep the space before them."""
    from transformers import RobertaTokenizer

    model = json.loads(tiny.bpe_tokenizer().backend_tokenizer.to_str())["model"]
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    base = {name: i for i, name in enumerate(names)}
    kept = [token for token in model["vocab"] if token not in tiny.SPECIALS]
    vocab = {**base, **{token: i + len(base) for i, token in enumerate(kept)}}
    return RobertaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])


def splitting() -> Any:
    """A byte-level BPE behind a pattern, as those of Llama 3 and Qwen."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny.bpe_tokenizer()
    pattern = Regex(r"'s| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def xlm_roberta() -> Any:
    """A Unigram vocabulary that holds `</s>` among its pieces."""
    from transformers import XLMRobertaTokenizer

    frame = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return XLMRobertaTokenizer(vocab=[*frame, *PIECES, ("<mask>", 0.0)])


def t5() -> Any:
    """A Unigram vocabulary that ends texts with `</s>`."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES])


def bert() -> Any:
    """Word pieces framed by `[CLS] … [SEP]`."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "[", "]"]
    return BertTokenizer(vocab={name: i for i, name in enumerate(names)})


def mbart50() -> Any:
    """A text begins with its language and ends with `</s>`."""
    from transformers import MBart50Tokenizer

    frame = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return MBart50Tokenizer(vocab=[*frame, *PIECES])


def mbart() -> Any:
    """A text ends with `</s>` and its language, where the decoder begins."""
    from transformers import MBartTokenizer

    frame = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return MBartTokenizer(vocab=[*frame, *PIECES])


def nllb() -> Any:
    """A text begins with its language (`deu_Latn`) and ends with `</s>`."""
    from transformers import NllbTokenizer

    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    pieces = ["▁", *LETTERS, *WORDS]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(dict.fromkeys(pieces))}
    return NllbTokenizer(vocab=vocab, merges=[])


def write_phobert(folder: Path) -> Path:
    """A tokenizer written in Python, which tells nothing about where its tokens come from."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*(f"{letter}@@ 1\n" for letter in LETTERS), *(f"{letter} 1\n" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("".join(lines))
    (folder / "bpe.codes").write_text("")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PhobertTokenizer"})
    )
    return folder


def save(
    tokenizer: Any, folder: Path, model_type: str, auto: str = "AutoModel", **config: Any
) -> Path:
    """A folder with a tokenizer and a small random model of some type."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), **config}
    built = transformers.AutoConfig.for_model(model_type, **shape)
    getattr(transformers, auto).from_config(built).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
TWO_SIDED: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
