"""Tiny tokenizers, models and data with a learnable signal; all made here, nothing downloaded."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec import JobSpec, parse_spec

Row = dict[str, Any]

SUBJECTS = ("the film", "this book", "my lunch", "the long walk", "that song", "her speech")
GOOD = ("great", "lovely", "wonderful", "bright", "superb")
BAD = ("awful", "boring", "terrible", "dull", "dreadful")
EXTRAS = ("today", "as far as I can say", "and so were we", "from start to end", "again")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>", "<|end|>")
HIDDEN, LAYERS, HEADS = 32, 2, 4


@dataclass(frozen=True)
class Tiny:
    """Folders of everything a test may load."""

    root: Path

    @property
    def bert(self) -> Path:
        """A BERT with its WordLevel tokenizer (`[CLS] … [SEP]`)."""
        return self.root / "bert"

    @property
    def llama(self) -> Path:
        """A Llama with its byte-level BPE tokenizer, no chat template."""
        return self.root / "llama"

    @property
    def gpt2(self) -> Path:
        """A GPT-2 with the same tokenizer."""
        return self.root / "gpt2"

    @property
    def t5(self) -> Path:
        """A T5 with the tokenizer of the Llama."""
        return self.root / "t5"

    @property
    def qwen2(self) -> Path:
        """A Qwen2 with that tokenizer and a chat template."""
        return self.root / "qwen2"


def build(root: Path) -> Tiny:
    """Write all models and tokenizers below `root`."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    tiny = Tiny(root)
    words, plain, chat = word_tokenizer(), bpe_tokenizer(), bpe_tokenizer(CHAT_TEMPLATE)
    rope: dict[str, Any] = {
        "vocab_size": len(plain),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 128,
        "pad_token_id": plain.pad_token_id,
        "eos_token_id": plain.eos_token_id,
        "bos_token_id": plain.eos_token_id,
    }
    bert = BertConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=words.pad_token_id,
    )
    gpt2 = GPT2Config(
        vocab_size=len(plain),
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=plain.eos_token_id,
        eos_token_id=plain.eos_token_id,
    )
    t5 = T5Config(
        vocab_size=len(plain),
        d_model=HIDDEN,
        d_ff=2 * HIDDEN,
        d_kv=HIDDEN // HEADS,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=plain.pad_token_id,
        eos_token_id=plain.eos_token_id,
        decoder_start_token_id=plain.pad_token_id,
    )
    torch.manual_seed(0)
    for folder, model, tokenizer in (
        (tiny.bert, BertForSequenceClassification(bert), words),
        (tiny.llama, LlamaForCausalLM(LlamaConfig(**rope)), plain),
        (tiny.gpt2, GPT2LMHeadModel(gpt2), plain),
        (tiny.t5, T5ForConditionalGeneration(t5), plain),
        (tiny.qwen2, Qwen2ForCausalLM(Qwen2Config(**{**rope, "vocab_size": len(chat) + 1})), chat),
    ):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return tiny


def word_tokenizer() -> Any:
    """Words of the sentences below, framed by `[CLS]` and `[SEP]`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIALS, *sorted({w for s in _corpus() for w in s.lower().split()})]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(s, vocabulary.index(s)) for s in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def bpe_tokenizer(chat_template: str | None = None, trim_offsets: bool = False) -> Any:
    """A byte-level BPE: any text goes in and comes out unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="<|im_end|>" if chat_template else "<|end|>",
    )
    if chat_template:
        wrapped.chat_template = chat_template
    return wrapped


def _corpus() -> list[str]:
    return [
        f"{subject} was {word} {extra} not good bad"
        for subject in SUBJECTS
        for word in (*GOOD, *BAD)
        for extra in EXTRAS
    ]


def labeled(n: int, seed: int = 0) -> list[Row]:
    """Sentences of varying length; the label `good` or `bad` follows from one word."""
    rng = random.Random(seed)
    return [
        {"text": _sentence(rng, label), "label": label}
        for label in (rng.choice(("good", "bad")) for _ in range(n))
    ]


def documents(n: int, seed: int = 0) -> list[Row]:
    """Documents of one to four sentences, in the column `text`."""
    rng = random.Random(seed)
    return [
        {"text": " ".join(_sentence(rng, "good") for _ in range(rng.randint(1, 4)))}
        for _ in range(n)
    ]


def instructions(n: int, seed: int = 0) -> list[Row]:
    """Pairs of `prompt` and `answer`."""
    rows = labeled(n, seed)
    return [{"prompt": f"{r['text']} good or bad", "answer": r["label"]} for r in rows]


def chats(n: int, seed: int = 0) -> list[Row]:
    """Chats of one or two turns each side, in the column `messages`."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        messages = []
        for row in labeled(rng.randint(1, 2), rng.randrange(10**6)):
            messages += [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": f"it was {row['label']}"},
            ]
        out.append({"messages": messages})
    return out


def _sentence(rng: random.Random, label: str) -> str:
    extras = rng.sample(EXTRAS, rng.randint(0, 3))
    word = rng.choice(GOOD if label == "good" else BAD)
    return " ".join((rng.choice(SUBJECTS), "was", word, *extras))


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    """One JSON object per line."""
    return _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """A header and one record per row; `.tsv` is separated by tabs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row], group_rows: int = 1000) -> Path:
    """A Parquet file with row groups of `group_rows` rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group_rows)
    return path


def write_text(path: Path, rows: Sequence[Row]) -> Path:
    """The column `text`, one row per line."""
    return _write(path, "".join(row["text"] + "\n" for row in rows))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as handle:
        handle.write(text)
    return path


def job(
    folder_of_model: Path, train: Path | str | Sequence[Path], folder: Path, **fields: Any
) -> JobSpec:
    """A classification job (or the `task` given) that keeps all its files below `folder`.

    `data` and `model` are added to what is set here: `job(…, data={"eval_fraction": 0.2}, seed=7)`.
    """
    paths = str(train) if isinstance(train, str | Path) else [str(t) for t in train]
    given = {
        "name": "tiny",
        "task": {"type": "text_classification"},
        "storage_path": str(folder / "runs"),
        **fields,
    }
    given["model"] = {"pretrained": str(folder_of_model), **fields.get("model", {})}
    data = {"train": paths, "prepared_dir": str(folder / "prepared")}
    given["data"] = {**data, **fields.get("data", {})}
    return parse_spec(given)


WAVE_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
"""Of a wav2vec2 with one output per 20 samples."""


def tones(text: str) -> bytes:
    """A WAV file at 1000 Hz in which each character is a tone of its own for 0.1 s."""
    import io

    import numpy as np
    import soundfile

    time = np.arange(100) / 1000
    pitches = [40 + 30 * (ord(character) % 13) for character in text]
    wave = np.concatenate([np.sin(2 * np.pi * pitch * time) for pitch in pitches])
    out = io.BytesIO()
    soundfile.write(out, wave / 2, 1000, format="WAV")
    return out.getvalue()
