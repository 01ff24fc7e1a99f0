"""One padding token everywhere, and padding that changes no row's result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import vocabularies
from one_process import encoded, measured, model_of, planned
from transformers import AutoConfig, AutoTokenizer
from vocabularies import SHAPE, TWO_SIDED

from orchestrator.errors import OrchestratorError
from orchestrator.model.config import load_config
from orchestrator.model.padding import (
    padded_on,
    padding_id,
    padding_side,
    set_tokenizer_padding,
    set_tokens,
)
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.train.baseline import frozen_feature_baseline

ANY = tiny.__file__
"""Stands for training rows that are never read."""
ROWS = [
    {"text": "great film", "label": "good"},
    {"text": "great film!", "label": "bad"},
    {"text": "the film was great from start to end and so were we", "label": "good"},
    {"text": "a <|end|> [PAD] <|end|>", "label": "bad"},
] * 3


def spaceless() -> Any:
    """A byte-level BPE whose token 0 is a word, and that has an end of text but no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["!", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"!"})]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


DECODER: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2}
CLASSIFIERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gpt2": (spaceless, "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "llama": (spaceless, "llama", DECODER),
    "qwen2": (spaceless, "qwen2", DECODER),
    "bert": (tiny.word_tokenizer, "bert", {**SHAPE, "pad_token_id": 0}),
    "roberta": (vocabularies.roberta, "roberta", {**SHAPE, "pad_token_id": 1}),
    "xlnet": (
        tiny.word_tokenizer,
        "xlnet",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0},
    ),
    "bart": (
        tiny.bpe_tokenizer,
        "bart",
        {**TWO_SIDED, "pad_token_id": 0, "eos_token_id": 6, "bos_token_id": 2, "decoder_start_token_id": 6},
    ),
    "t5": (
        tiny.bpe_tokenizer,
        "t5",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
         "eos_token_id": 6, "decoder_start_token_id": 0},
    ),
}  # fmt: skip
LEFT = {"xlnet"}


def classifier(kind: str, tmp_path: Path, **fields: Any) -> Any:
    make, model_type, config = CLASSIFIERS[kind]
    folder = vocabularies.save(make(), tmp_path / kind, model_type, **config)
    train = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    return tiny.job(folder, train, tmp_path, resources={"num_workers": 1}, **fields)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_rows_result_depends_on_its_text_and_not_on_its_neighbors(
    tmp_path: Path, kind: str
) -> None:
    spec = classifier(kind, tmp_path)
    plan, rows = planned(spec), encoded(spec)[: len(ROWS) // 3]
    assert plan.padding_side == ("left" if kind in LEFT else "right")
    model = model_of(plan)
    together = measured(plan, model, rows)["loss"]
    alone = [measured(plan, model, [row])["loss"][0] for row in rows]
    assert np.allclose(together, alone, atol=1e-6)
    tokenizer = load_tokenizer(spec)
    set_tokenizer_padding(tokenizer, plan.pad_token_id, plan.padding_side)
    texts = [{"text": row["text"]} for row in ROWS[:4]]
    predicted = spec.task.predict(model, tokenizer, texts, plan.max_length_tokens)
    each = [spec.task.predict(model, tokenizer, [row], plan.max_length_tokens)[0] for row in texts]
    assert [p["score"] for p in predicted] == pytest.approx([p["score"] for p in each], abs=2e-6)
    if make_reads_marks(kind):
        assert predicted[0]["score"] != predicted[1]["score"]


def make_reads_marks(kind: str) -> bool:
    """Whether the tokenizer tells `great film` from `great film!`."""
    tokenizer = CLASSIFIERS[kind][0]()
    return tokenizer("film")["input_ids"] != tokenizer("film!")["input_ids"]


def test_without_a_padding_token_the_end_of_text_pads_and_never_token_0(tmp_path: Path) -> None:
    spec = classifier("gpt2", tmp_path)
    plan, tokenizer = planned(spec), spaceless()
    assert plan.pad_token_id == tokenizer.eos_token_id != 0
    model = model_of(plan)
    assert model.config.pad_token_id == plan.pad_token_id
    batch = plan.collate(encoded(spec)[:3], np.ones(3, np.float32))
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert set(padding.tolist()) == {plan.pad_token_id}
    assert all(plan.pad_token_id not in row["input_ids"] for row in encoded(spec))


@pytest.mark.parametrize(
    ("added", "chosen"),
    [
        (["<|reserved_7|>"], "<|reserved_7|>"),
        (["<|reserved_7|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        ([], "<|end|>"),
    ],
)
def test_a_token_that_is_meant_for_it_pads_before_the_end_of_text(
    tmp_path: Path, added: list[str], chosen: str
) -> None:
    tokenizer = spaceless()
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    config = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": len(tokenizer)}
    folder = vocabularies.save(tokenizer, tmp_path / "m", "gpt2", **config)
    spec = tiny.job(folder, ANY, tmp_path)
    found = padding_id(spec, ("bad", "good"), load_tokenizer(spec))
    assert tokenizer.convert_ids_to_tokens(found) == chosen


@pytest.mark.parametrize("padding", [-1, 10_000, 0])
def test_a_padding_token_that_cannot_be_one_is_passed_over(tmp_path: Path, padding: int) -> None:
    """Outside the vocabulary, or a word (token 0 is `!`)."""
    tokenizer = spaceless()
    folder = vocabularies.save(tokenizer, tmp_path / "m", "llama", **DECODER)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = padding
    config.save_pretrained(folder)
    spec = tiny.job(folder, ANY, tmp_path)
    labels = ("bad", "good")
    assert padding_id(spec, labels, load_tokenizer(spec)) == tokenizer.eos_token_id
    assert load_config(spec, labels).pad_token_id in (None, 0)


def test_a_padding_token_beyond_the_embeddings_is_passed_over(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    """`add_special_tokens({"pad_token": "[PAD]"})` without resizing the model."""
    folder = tmp_path / "m"
    shutil.copytree(models.gpt2, folder)
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new padding>"})
    tokenizer.save_pretrained(folder)
    spec = tiny.job(folder, ANY, tmp_path)
    found = padding_id(spec, ("bad", "good"), load_tokenizer(spec))
    assert found < AutoConfig.from_pretrained(folder).vocab_size
    assert found in tokenizer.all_special_ids or found in tokenizer.added_tokens_decoder


def test_a_classifier_without_any_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    tokenizer = spaceless()
    tokenizer.eos_token = None
    bare = tokenizer.backend_tokenizer
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fresh = Tokenizer(models.BPE({t: i for t, i in bare.get_vocab().items() if len(t) == 1}, []))
    fresh.pre_tokenizer = bare.pre_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fresh)
    folder = vocabularies.save(tokenizer, tmp_path / "m", "llama", **DECODER)
    spec = tiny.job(folder, ANY, tmp_path)
    with pytest.raises(OrchestratorError, match="pad_token"):
        padding_id(spec, ("bad", "good"), load_tokenizer(spec))


def test_a_model_that_counts_positions_from_its_padding_token_keeps_it(tmp_path: Path) -> None:
    make, kind, config = CLASSIFIERS["roberta"]
    folder = vocabularies.save(make(), tmp_path / "m", kind, **config)
    plan = planned(
        tiny.job(
            folder,
            tiny.write_jsonl(tmp_path / "t.jsonl", ROWS),
            tmp_path,
            resources={"num_workers": 1},
        )
    )
    model = model_of(plan)
    set_tokens(model, 0, {})
    assert model.config.pad_token_id == 1
    bert: Any = model_of(planned(classifier("bert", tmp_path)))
    set_tokens(bert, 5, {})
    assert bert.config.pad_token_id == 5


def test_padding_moves_to_the_left_with_its_mask() -> None:
    batch = {
        "input_ids": torch.tensor([[7, 8, 9], [5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "labels": torch.tensor([1, 0]),
    }
    moved = padded_on(batch, "left")
    assert moved["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert moved["labels"] is batch["labels"]
    assert padded_on(batch, "right") is batch


def test_a_model_that_does_not_hide_padding_is_warned_of(tmp_path: Path) -> None:
    config = {**SHAPE, "type_vocab_size": 2, "pad_token_id": 0}
    folder = vocabularies.save(tiny.word_tokenizer(), tmp_path / "m", "fnet", **config)
    _, warning = padding_side(tiny.job(folder, ANY, tmp_path), ("bad", "good"))
    assert warning is not None
    assert "fnet" in warning


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "xlnet"])
def test_the_baseline_reads_rows_of_every_kind_of_model(tmp_path: Path, kind: str) -> None:
    plan = planned(classifier(kind, tmp_path, data={"eval": str(tmp_path / "train.jsonl")}))
    found = frozen_feature_baseline(plan)
    assert found["train_rows"] == len(ROWS)
    assert 0 <= found["metrics"]["accuracy"] <= 1


def test_every_row_of_an_encoder_decoder_ends_with_one_end_of_text(tmp_path: Path) -> None:
    spec = classifier("bart", tmp_path)
    assert AutoTokenizer.from_pretrained(spec.model.pretrained)("film")["input_ids"].count(6) == 0
    assert [list(row["input_ids"]).count(6) for row in encoded(spec)] == [1] * len(ROWS)
