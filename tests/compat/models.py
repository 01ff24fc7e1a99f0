"""Tiny pretrained models of any architecture, with the tokenizer or processor its checkpoints have."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers

from compat.architectures import Architecture

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = sorted(
    {word for row in tiny.labeled(200) for word in row["text"].split()} | {"good", "bad"}
)


def build(architecture: Architecture, root: Path) -> Path:
    """Write the architecture's model below `root` as its checkpoints come; returns the folder."""
    folder = root / architecture.name.replace(" ", "-").replace("/", "-")
    if folder.exists():
        return folder
    tokenizer = TOKENIZERS[architecture.tokenizer]() if architecture.tokenizer else None
    auto = getattr(transformers, architecture.auto)
    model = auto.from_config(config_of(architecture, tokenizer), dtype=torch.float32)
    torch.manual_seed(0)
    redraw(model)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if architecture.processor is not None:
        text = json.dumps(architecture.processor)
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def remove(folder: Path) -> None:
    """Delete a model that no further cell needs."""
    shutil.rmtree(folder, ignore_errors=True)


def config_of(architecture: Architecture, tokenizer: Any) -> Any:
    """The architecture's config; sizes and special tokens of its vocabulary are the tokenizer's."""
    fields = dict(architecture.config)
    if tokenizer is not None:
        ids = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("pad", "bos", "eos")
            if getattr(tokenizer, f"{name}_token_id") is not None
        }
        fields = {"vocab_size": largest_id(tokenizer) + 1, **ids, **fields}
    config = transformers.AutoConfig.for_model(architecture.model_type, **fields)
    config.architectures = []  # of several classes with one head, the auto class then takes the first
    return config


def largest_id(tokenizer: Any) -> int:
    """The largest token id that the tokenizer gives."""
    return max(len(tokenizer) - 1, *tokenizer.get_vocab().values())


def redraw(model: torch.nn.Module) -> None:
    """Draw all matrices with outputs of about the size of their inputs.

    Fresh models are nearly flat: attention over padding, or over a neighbor, would change nothing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name and parameter.numel() > 1:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.normal_(std=1 / math.sqrt(max(fan_in, 1)))
    if hasattr(model, "tie_weights"):
        model.tie_weights()


# --- tokenizers


def wordpiece() -> Any:
    """BERT's: `[CLS] … [SEP]`."""
    return transformers.BertTokenizer(vocab=_wordpiece_vocabulary())


def mpnet() -> Any:
    """MPNet's: WordPiece with RoBERTa's special tokens."""
    pieces = [*WORDS, *(f"##{c}" for c in LETTERS), *(c for c in LETTERS if c not in WORDS)]
    specials = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
    return transformers.MPNetTokenizer(vocab=_numbered(*specials, *pieces))


def funnel() -> Any:
    """Funnel's: WordPiece with `<cls>` and `<sep>`."""
    pieces = [*WORDS, *(f"##{c}" for c in LETTERS), *(c for c in LETTERS if c not in WORDS)]
    specials = ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>")
    return transformers.FunnelTokenizer(vocab=_numbered(*specials, *pieces))


def _wordpiece_vocabulary() -> dict[str, int]:
    pieces = [*WORDS, *(f"##{c}" for c in LETTERS), *(c for c in LETTERS if c not in WORDS)]
    return _numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces)


def roberta() -> Any:
    """RoBERTa's and BART's byte-level BPE: `<s> … </s>`, padding id 1."""
    vocabulary, merges = _byte_pairs("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)


def gpt2() -> Any:
    """GPT-2's byte-level BPE: an end of text, and no padding token."""
    vocabulary, merges = _byte_pairs("<|endoftext|>")
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)


def opt() -> Any:
    """OPT's: GPT-2's with `</s>` put in front of every text."""
    vocabulary, merges = _byte_pairs("<s>", "<pad>", "</s>", "<unk>")
    made = transformers.GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )
    return made


def llama() -> Any:
    """Llama 2's: `<s>` in front, padded on the left, and no padding token."""
    pieces, merges = _word_merges()
    vocabulary = _numbered("<unk>", "<s>", "</s>", *_bytes(), *pieces)
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def _bytes() -> list[str]:
    return [f"<0x{i:02X}>" for i in range(256)]


def gemma() -> Any:
    """Gemma's: `<bos>` in front, a padding token, padded on the left; with a chat template."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    pieces, merges = _word_merges()
    vocabulary = _numbered(*tokens, *_bytes(), *pieces)
    made = transformers.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
        "('model' if m.role == 'assistant' else m.role) + '\n' + m.content + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    return made


def chat() -> Any:
    """A byte-level BPE with padding token and a chat template, as Llama 3's."""
    return _of_decoder(tiny.bpe_tokenizer(tiny.CHAT_TEMPLATE))


def qwen() -> Any:
    """Qwen's byte-level BPE, padded with the end of text, with a chat template."""
    vocabulary, merges = _byte_pairs("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")
    made.chat_template = tiny.CHAT_TEMPLATE
    return made


def bloom() -> Any:
    """A byte-level BPE with a padding token, padded on the left, as BLOOM's."""
    made = _of_decoder(tiny.bpe_tokenizer())
    made.padding_side = "left"
    return made


def _of_decoder(tokenizer: Any) -> Any:
    """The tokenizer without `token_type_ids`, which decoders do not take."""
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer


def t5() -> Any:
    """T5's unigram model: `… </s>`."""
    return transformers.T5Tokenizer(vocab=_unigram("<pad>", "</s>", "<unk>"), extra_ids=2)


def xlnet() -> Any:
    """XLNet's: `… <sep> <cls>`, padded on the left."""
    specials = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
    return transformers.XLNetTokenizer(vocab=_unigram(*specials), unk_id=0)


def albert() -> Any:
    """ALBERT's unigram model: `[CLS] … [SEP]`."""
    return transformers.AlbertTokenizer(
        vocab=_unigram("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    )


def xlm_roberta() -> Any:
    """XLM-R's unigram model: `<s> … </s>`, padding id 1."""
    vocabulary = _unigram("<s>", "<pad>", "</s>", "<unk>")
    return transformers.XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)])


def camembert() -> Any:
    """CamemBERT's unigram model: `<s> … </s>`."""
    vocabulary = _unigram("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED")
    return transformers.CamembertTokenizer(
        vocab=[*vocabulary, ("<s>", 0.0), ("</s>", 0.0), ("<mask>", 0.0)]
    )


def deberta_v2() -> Any:
    """DeBERTa-v2's and v3's unigram model: `[CLS] … [SEP]`."""
    return transformers.DebertaV2Tokenizer(
        vocab=_unigram("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    )


def big_bird() -> Any:
    """BigBird's unigram model: `[CLS] … [SEP]`."""
    specials = ("<pad>", "</s>", "<s>", "<unk>", "[SEP]", "[MASK]", "[CLS]")
    return transformers.BigBirdTokenizer(vocab=_unigram(*specials))


def mbart50() -> Any:
    """mBART-50's: a language code in front, `</s>` behind."""
    return transformers.MBart50Tokenizer(
        vocab=_unigram("<s>", "<pad>", "</s>", "<unk>"), src_lang="en_XX", tgt_lang="de_DE"
    )


def pegasus() -> Any:
    """Pegasus' unigram model: `… </s>`."""
    vocabulary = _unigram("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>")
    return transformers.PegasusTokenizer(vocab=vocabulary, offset=0)


def xglm() -> Any:
    """XGLM's unigram model: `</s>` in front."""
    return transformers.XGLMTokenizer(vocab=_unigram("<s>", "<pad>", "</s>", "<unk>"))


def _unigram(*specials: str) -> list[tuple[str, float]]:
    """Pieces with their scores: the special tokens, then words, then letters."""
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [(c, -3.0) for c in ("▁", *LETTERS)]
    return [(special, 0.0) for special in specials] + pieces


def _word_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """(pieces, merges) of a BPE over letters that puts whole words together from their front."""
    merges = [
        ("▁" + word[:i], word[i]) for word in WORDS for i in range(len(word)) if word.isalpha()
    ]
    letters = sorted({*LETTERS, *"".join(WORDS)})
    return ["▁", *letters, *("".join(pair) for pair in merges)], list(dict.fromkeys(merges))


def _numbered(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _byte_pairs(*specials: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of the tests' byte-level BPE with other special tokens."""
    trained = json.loads(tiny.bpe_tokenizer().backend_tokenizer.to_str())["model"]
    pieces = [t for t in trained["vocab"] if t not in tiny.SPECIALS]
    return _numbered(*specials, *pieces), [tuple(pair) for pair in trained["merges"]]


TOKENIZERS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        wordpiece, mpnet, funnel, roberta, gpt2, opt, llama, gemma, chat, qwen, bloom, t5, xlnet, albert,
        xlm_roberta, camembert, deberta_v2, big_bird, mbart50, pegasus, xglm,
    )
}  # fmt: skip
"""Tokenizers by the name that `Architecture.tokenizer` gives."""
