"""Tokenizers as they come: control tokens' names in texts, words, languages, fingerprints, vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import vocabularies
from one_process import planned
from transformers import AutoTokenizer

from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.model.build import build_model
from orchestrator.model.config import load_config
from orchestrator.model.positions import max_length_tokens
from orchestrator.model.tokenizer import (
    check_tokens,
    largest_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from orchestrator.tasks.base import BadRow
from orchestrator.tasks.tokenizing import (
    control_ids,
    language_codes,
    set_languages,
    special_text_is_data,
    target_start,
    words_have_leading_space,
)
from orchestrator.tasks.words import NO_TOKEN, aligned

ANY = tiny.__file__
"""Stands for training rows that are never read."""
KINDS = ("roberta", "splitting", "xlm_roberta", "t5", "bert", "mbart50", "nllb")
TYPED = "great </s> [SEP] film<|end|> x</s>x <mask>"


def make(kind: str) -> Any:
    return getattr(vocabularies, kind)()


def controls_in(tokenizer: Any, text: str) -> list[str]:
    known = control_ids(tokenizer)
    return [known[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i in known]


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_control_token_typed_in_a_text_is_text(kind: str) -> None:
    assert controls_in(make(kind), TYPED)  # so the test can fail
    tokenizer = make(kind)
    frame, plain = tokenizer("")["input_ids"], tokenizer("great film")["input_ids"]
    special_text_is_data(tokenizer)
    once = str(tokenizer.backend_tokenizer.normalizer)
    special_text_is_data(tokenizer)
    assert str(tokenizer.backend_tokenizer.normalizer) == once
    assert controls_in(tokenizer, TYPED) == []
    assert tokenizer("")["input_ids"] == frame
    assert tokenizer("great film")["input_ids"] == plain


def test_a_tokenizer_in_python_reads_the_name_of_a_control_token_as_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(vocabularies.write_phobert(tmp_path))
    assert controls_in(tokenizer, "a </s> b")
    special_text_is_data(tokenizer)
    special_text_is_data(tokenizer)
    assert controls_in(tokenizer, "a </s> b") == []
    assert tokenizer("a b")["input_ids"] == [0, *tokenizer.convert_tokens_to_ids(["a", "b"]), 2]


def test_control_tokens_inside_texts_can_be_asked_for(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [{"text": "great [SEP] film", "label": "good"}]
    read: list[Any] = []
    for asked in (False, True):
        spec = tiny.job(models.bert, ANY, tmp_path, data={"parse_special_tokens": asked})
        tokenizer = load_tokenizer(spec)
        [row] = spec.task.encode(rows, tokenizer, 32, ("bad", "good"))
        assert not isinstance(row, BadRow)
        read.append((row["input_ids"].count(tokenizer.sep_token_id), tokenizer_fingerprint(spec)))
    assert [count for count, _ in read] == [1, 2]
    assert read[0][1] != read[1][1]


@pytest.mark.parametrize("kind", ["roberta", "splitting", "bpe"])
def test_words_of_a_byte_level_tokenizer_keep_their_leading_space(kind: str) -> None:
    tokenizer = tiny.bpe_tokenizer() if kind == "bpe" else make(kind)
    words_have_leading_space(tokenizer)
    words_have_leading_space(tokenizer)
    row = aligned(["great", "film", "today"], tokenizer, 32)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert [tokens[i] for i in row["positions"]] == ["Ġgreat", "Ġfilm", "Ġtoday"]
    assert (
        aligned(["great", "film"], tokenizer, 32)["input_ids"]
        == tokenizer("great film")["input_ids"]
    )


def test_words_are_placed_in_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(vocabularies.write_phobert(tmp_path))
    row = aligned(["ab", "", "c"], tokenizer, 32)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["<s>", "a@@", "b", "c", "</s>"]
    assert row["positions"] == [1, NO_TOKEN, 3]
    assert (row["n_targets"], row["truncated"]) == (2, 0)
    cut = aligned(["ab", "c", "de"], tokenizer, 5)
    assert tokenizer.convert_ids_to_tokens(cut["input_ids"]) == ["<s>", "a@@", "b", "c", "</s>"]
    assert (cut["positions"], cut["truncated"]) == ([1, 3, NO_TOKEN], 1)


def phobert_job(tmp_path: Path, task: str) -> Any:
    folder = vocabularies.write_phobert(tmp_path / "phobert")
    config = {"model_type": "roberta", "vocab_size": 64, "pad_token_id": 1, **vocabularies.SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    return tiny.job(folder, ANY, tmp_path, task={"type": task})


def test_a_tokenizer_in_python_serves_classification_and_tagging(tmp_path: Path) -> None:
    rows = [
        {"text": "great film", "label": "good", "tokens": ["great", "film"], "tags": ["B-X", "O"]}
    ]
    for task, labels in (
        ("text_classification", ("bad", "good")),
        ("token_classification", ("B-X", "O")),
    ):
        spec = phobert_job(tmp_path, task)
        tokenizer = load_tokenizer(spec)
        [row] = spec.task.encode(rows, tokenizer, max_length_tokens(spec), labels)
        assert not isinstance(row, BadRow)
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "great film"


def test_answers_are_not_looked_for_without_the_places_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="PhobertTokenizer"):
        load_tokenizer(phobert_job(tmp_path, "question_answering"))


SENTENCES = {"source": "hello world", "target": "hallo welt"}


@pytest.mark.parametrize(
    ("kind", "codes", "source", "target", "start"),
    [
        (
            "mbart50",
            ("en_XX", "de_DE"),
            ["en_XX", "▁hello", "▁world", "</s>"],
            ["de_DE", "▁hallo", "▁welt", "</s>"],
            {"forced_bos_token_id": "de_DE"},
        ),
        (
            "mbart",
            ("en_XX", "de_DE"),
            ["▁hello", "▁world", "</s>", "en_XX"],
            ["▁hallo", "▁welt", "</s>", "de_DE"],
            {"decoder_start_token_id": "de_DE"},
        ),
        ("nllb", ("eng_Latn", "deu_Latn"), None, None, {"forced_bos_token_id": "deu_Latn"}),
    ],
)
def test_sources_and_targets_are_marked_with_their_languages(
    tmp_path: Path,
    kind: str,
    codes: tuple[str, str],
    source: list[str] | None,
    target: list[str] | None,
    start: dict[str, str],
) -> None:
    folder = vocabularies.save(make(kind), tmp_path / kind, "mbart", **vocabularies.TWO_SIDED)
    task = {"type": "seq2seq", "source_language": codes[0], "target_language": codes[1]}
    spec = tiny.job(folder, ANY, tmp_path, task=task)
    tokenizer = load_tokenizer(spec)
    [row] = spec.task.encode([SENTENCES], tokenizer, 32, ())
    assert not isinstance(row, BadRow)
    tokens = [tokenizer.convert_ids_to_tokens(row[name]) for name in ("input_ids", "label_ids")]
    if source is not None:
        assert tokens == [source, target]
    assert codes[0] in tokens[0]
    assert codes[1] in tokens[1]
    assert [one.count("</s>") for one in tokens] == [1, 1]
    assert target_start(tokenizer) == {
        name: tokenizer.convert_tokens_to_ids(code) for name, code in start.items()
    }
    cut = spec.task.model_copy(update={"max_target_tokens": 3}).encode(
        [SENTENCES], tokenizer, 3, ()
    )[0]
    assert not isinstance(cut, BadRow)
    assert (len(cut["input_ids"]), len(cut["label_ids"]), cut["truncated"]) == (3, 3, 1)
    assert tokenizer.convert_tokens_to_ids(codes[1]) in cut["label_ids"]


@pytest.mark.parametrize(
    ("languages", "named"),
    [
        ({}, "task.source_language"),
        ({"source_language": "en_XX"}, "task.target_language"),
        ({"source_language": "en_XX", "target_language": "de"}, "task.target_language = 'de'"),
    ],
)
def test_languages_are_required_by_tokenizers_that_mark_them(
    languages: dict[str, str], named: str
) -> None:
    source, target = languages.get("source_language"), languages.get("target_language")
    with pytest.raises(OrchestratorError, match=f"{named}.*de_DE, en_XX"):
        set_languages(make("mbart50"), source, target)


def test_languages_are_refused_by_tokenizers_without(models: tiny.Tiny, tmp_path: Path) -> None:
    task = {"type": "seq2seq", "target_language": "de_DE"}
    assert language_codes(AutoTokenizer.from_pretrained(models.t5)) == ()
    with pytest.raises(OrchestratorError, match=r"task\.target_language = 'de_DE'"):
        load_tokenizer(tiny.job(models.t5, ANY, tmp_path, task=task))


@pytest.mark.parametrize(
    "name",
    ["sentencepiece.bpe.model", "bpe.codes", "tokenizer.model.v3", "qwen.tiktoken", "merges.txt",
     "chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenization_own.py"],
)  # fmt: skip
def test_the_fingerprint_covers_every_file_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    path = folder / name
    path.parent.mkdir(parents=True)
    found = []
    for text in ("a", "b"):
        path.write_text(text)
        found.append(tokenizer_fingerprint(tiny.job(folder, ANY, tmp_path)))
    path.unlink()
    assert len({*found, tokenizer_fingerprint(tiny.job(folder, ANY, tmp_path))}) == 3


def test_the_fingerprint_leaves_weights_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    before = tokenizer_fingerprint(tiny.job(folder, ANY, tmp_path))
    for name in ("model.safetensors", "pytorch_model.bin", "generation_config.json"):
        (folder / name).write_text("{}")
    assert tokenizer_fingerprint(tiny.job(folder, ANY, tmp_path)) == before


def test_the_fingerprint_of_a_hub_id_is_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--someone--model"
    commits = ["a" * 40, "b" * 40]
    found = []
    for commit in commits:
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "tokenizer_config.json").write_text("{}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        from orchestrator.model import tokenizer as module

        module._commit.cache_clear()
        monkeypatch.setattr(hub, "cached_file", _from(cache, hub.cached_file))
        found.append(tokenizer_fingerprint(tiny.job("someone/model", ANY, tmp_path)))  # type: ignore[arg-type]
    assert found == [f"someone/model@{commit}" for commit in commits]


def _from(cache: Path, original: Any) -> Any:
    def find(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "cache_dir": cache, "local_files_only": True})

    return find


def larger(models: tiny.Tiny, tmp_path: Path, model: Any = None, **fields: Any) -> Any:
    """A job whose tokenizer has one token more than its model embeds."""
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = {"tokenizer": str(tmp_path / "tokenizer"), **(model or {})}
    return tiny.job(models.llama, ANY, tmp_path, task={"type": "causal_lm"}, model=own, **fields)


def test_a_token_beyond_the_embeddings_is_refused_only_where_a_row_uses_it(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    spec = larger(models, tmp_path)
    tokenizer = load_tokenizer(spec)
    known = vocabulary_size(load_config(spec, ()))
    assert known is not None
    assert largest_id(tokenizer) == known
    check_tokens(spec, (), tokenizer, known - 1)
    with pytest.raises(
        OrchestratorError, match=r"<image_soft_token>.*model.resize_embeddings=true"
    ):
        check_tokens(spec, (), tokenizer, known)


def test_embeddings_grow_on_request_and_the_new_row_is_like_the_others(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    spec = larger(models, tmp_path, {"resize_embeddings": True})
    tokenizer = load_tokenizer(spec)
    check_tokens(spec, (), tokenizer, largest_id(tokenizer))
    model: Any = build_model(spec, ())
    weight = model.get_input_embeddings().weight.detach()
    assert weight.shape[0] == model.config.vocab_size == largest_id(tokenizer) + 1
    assert np.allclose(weight[-1], weight[:-1].mean(0), atol=1e-2)
    assert model.get_input_embeddings().weight.requires_grad
    meta: Any = build_model(spec, (), on_meta=True)
    assert meta.get_input_embeddings().weight.shape == weight.shape


def test_new_rows_are_not_left_untrained_by_an_adapter(models: tiny.Tiny, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="resize_embeddings"):
        tiny.job(
            models.llama,
            "x",
            tmp_path,
            task={"type": "causal_lm"},
            model={"resize_embeddings": True},
            tuning={"type": "lora"},
        )


@pytest.mark.parametrize("used", [False, True])
def test_a_plan_looks_for_the_token_in_the_prepared_rows(
    models: tiny.Tiny, tmp_path: Path, used: bool
) -> None:
    rows = tiny.documents(6) + ([{"text": "a <image_soft_token> b"}] if used else [])
    train = str(tiny.write_jsonl(tmp_path / "train.jsonl", rows))
    fields = {"data": {"train": train, "max_length_tokens": 64}, "resources": {"num_workers": 1}}
    spec = larger(models, tmp_path, **fields)
    if not used:
        assert planned(spec).pad_token_id < largest_id(load_tokenizer(spec))
        return
    with pytest.raises(OrchestratorError, match=r"<image_soft_token>.*resize_embeddings"):
        planned(spec)
    resized = planned(larger(models, tmp_path, model={"resize_embeddings": True}, **fields))
    assert resized.model.vocab_size == largest_id(load_tokenizer(spec)) + 1
