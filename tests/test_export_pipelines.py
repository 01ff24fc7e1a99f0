"""Exports in plain `transformers` pipelines, in batches: the same predictions as `predict`."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
import vocabularies
from one_process import exported, model_of, planned
from test_padding import CLASSIFIERS, DECODER, spaceless
from vocabularies import SHAPE, TWO_SIDED

from orchestrator.plan import Plan
from orchestrator.train.export import load_exported
from orchestrator.train.predict import predictions

SENTENCES = [
    "great film",
    "great film!",
    "the film was great from start to end and so were we",
    "the </s> was [SEP] great <|end|>",
]


def job(folder: Path, tmp_path: Path, rows: list[Any], **fields: Any) -> Any:
    train = tiny.write_jsonl(tmp_path / "train.jsonl", rows * 2)
    return tiny.job(folder, train, tmp_path, resources={"num_workers": 1}, **fields)


def export(spec: Any, tmp_path: Path) -> tuple[Plan, Path]:
    plan = planned(spec)
    return plan, exported(plan, _alive(model_of(plan)), tmp_path / "export")


def _alive(model: Any) -> Any:
    """A model whose outputs differ from row to row by more than rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def predict(folder: Path, inputs: list[Any]) -> list[dict[str, Any]]:
    plan, model, tokenizer = load_exported(folder)
    return predictions(plan, model, tokenizer, inputs, 32)


KINDS = {
    **CLASSIFIERS,
    "xlm-roberta": (vocabularies.xlm_roberta, "xlm-roberta", {**SHAPE, "pad_token_id": 1}),
    "t5 of its own": (
        vocabularies.t5,
        "t5",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
         "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_scores_batches_as_predict_does(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, model_type, config = KINDS[kind]
    source = vocabularies.save(make(), tmp_path / "model", model_type, **config)
    rows = [{"text": t, "label": "good" if i % 2 else "bad"} for i, t in enumerate(SENTENCES)]
    _, folder = export(job(source, tmp_path, rows), tmp_path)
    capfd.readouterr()
    pipeline = transformers.pipeline("text-classification", str(folder), device="cpu")
    plain: Any = pipeline(SENTENCES, batch_size=4)
    alone: Any = [pipeline(text)[0] for text in SENTENCES]
    ours = predict(folder, list(SENTENCES))
    assert [one["label"] for one in plain] == [one["label"] for one in ours]
    for other in (plain, alone):
        assert [one["score"] for one in other] == pytest.approx(
            [one["score"] for one in ours], abs=3e-6
        )
    assert len({round(one["score"], 6) for one in ours}) > 2
    assert "pad_token_id" not in capfd.readouterr().err


TAGGERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "roberta": (vocabularies.roberta, "roberta", {**SHAPE, "pad_token_id": 1}),
    "bert": (vocabularies.bert, "bert", {**SHAPE, "pad_token_id": 0}),
    "gpt2": (spaceless, "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "splitting": (vocabularies.splitting, "qwen2", DECODER),
}


@pytest.mark.parametrize("kind", TAGGERS)
def test_a_tagger_tags_words_as_predict_does(tmp_path: Path, kind: str) -> None:
    make, model_type, config = TAGGERS[kind]
    source = vocabularies.save(make(), tmp_path / "model", model_type, **config)
    texts = ["great film", "the film was great and great was the film"]
    rows = [
        {"tokens": text.split(), "tags": ["B-X" if w == "film" else "O" for w in text.split()]}
        for text in texts
    ]
    spec = job(source, tmp_path, rows, task={"type": "token_classification"})
    _, folder = export(spec, tmp_path)
    pipeline = transformers.pipeline(
        "token-classification", str(folder), device="cpu", ignore_labels=[]
    )
    for text, found, ours in zip(
        texts,
        pipeline(texts, batch_size=2),
        predict(folder, [{"tokens": t} for t in texts]),
        strict=True,
    ):
        starts = [i for i, c in enumerate(text) if c != " " and (i == 0 or text[i - 1] == " ")]
        first: dict[int, str] = {}
        for (
            token
        ) in found:  # a word begins with the space before it, which may be a token of its own
            words = [k for k, s in enumerate(starts) if token["start"] <= s <= token["end"]]
            if words:
                first.setdefault(words[-1], token["entity"])
        assert [first[k] for k in range(len(starts))] == ours["tags"]


def test_a_language_model_writes_batches_as_predict_does(tmp_path: Path) -> None:
    source = vocabularies.save(
        spaceless(), tmp_path / "model", "gpt2", "AutoModelForCausalLM",
        n_embd=32, n_layer=2, n_head=4, n_positions=128,
    )  # fmt: skip
    spec = job(
        source,
        tmp_path,
        tiny.documents(4),
        task={"type": "causal_lm"},
        data={"max_length_tokens": 64},
    )
    plan, folder = export(spec, tmp_path)
    prompts = ["the film", "my lunch was great and so were we"]
    pipeline = transformers.pipeline("text-generation", str(folder), device="cpu")
    assert pipeline.tokenizer.padding_side == "left"
    assert (
        pipeline.tokenizer.pad_token_id == pipeline.model.config.pad_token_id == plan.pad_token_id
    )
    assert pipeline.tokenizer.model_max_length == 128
    written: Any = pipeline(
        prompts, batch_size=2, max_new_tokens=64, do_sample=False, return_full_text=False
    )
    ours = predict(folder, list(prompts))
    assert [one[0]["generated_text"] for one in written] == [one["completion"] for one in ours]


@pytest.mark.parametrize(
    ("kind", "start"), [("mbart50", "forced_bos_token_id"), ("mbart", "decoder_start_token_id")]
)
def test_a_translator_writes_batches_in_its_language(tmp_path: Path, kind: str, start: str) -> None:
    tokenizer = getattr(vocabularies, kind)()
    source = vocabularies.save(
        tokenizer, tmp_path / "model", "mbart", "AutoModelForSeq2SeqLM",
        **TWO_SIDED, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    task = {
        "type": "seq2seq",
        "source_language": "en_XX",
        "target_language": "de_DE",
        "max_target_tokens": 8,
    }
    rows = [
        {"source": "hello world", "target": "hallo welt"},
        {"source": "hello", "target": "hallo"},
    ]
    plan, folder = export(job(source, tmp_path, rows, task=task), tmp_path)
    german = tokenizer.convert_tokens_to_ids("de_DE")
    assert plan.target_start == {start: german}
    assert (folder / "generation_config.json").exists()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert getattr(model.generation_config, start) == german
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    assert (plain.src_lang, plain.tgt_lang) == ("en_XX", "de_DE")
    sources = [row["source"] for row in rows]
    inputs = plain(sources, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    place = 1 if start == "forced_bos_token_id" else 0
    assert ids[:, place].tolist() == [german, german]
    texts = [text.strip() for text in plain.batch_decode(ids, skip_special_tokens=True)]
    assert [one["target"] for one in predict(folder, list(sources))] == texts


def test_an_answer_finder_reads_batches_as_single_rows(tmp_path: Path) -> None:
    source = vocabularies.save(
        vocabularies.bert(), tmp_path / "model", "bert", **SHAPE, pad_token_id=0
    )
    rows = [
        {
            "question": "was great",
            "context": context,
            "answers": {"text": ["film"], "answer_start": [4]},
        }
        for context in ("the film was great", "the film was great and the film was the film")
    ]
    spec = job(source, tmp_path, rows, task={"type": "question_answering", "stride_tokens": 4})
    _, folder = export(spec, tmp_path)
    ours = predict(folder, rows)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    questions, contexts = [r["question"] for r in rows], [r["context"] for r in rows]
    inputs = plain(
        questions, contexts, padding=True, return_tensors="pt", return_offsets_mapping=True
    )
    offsets = inputs.pop("offset_mapping")
    with torch.no_grad():
        outputs = model(**inputs)
    for i, one in enumerate(ours):
        inside = np.array([side == 1 for side in inputs.sequence_ids(i)])
        scores = outputs.start_logits[i][:, None] + outputs.end_logits[i][None, :]
        allowed = torch.from_numpy(inside[:, None] & inside[None, :]).triu()
        best = int(scores.masked_fill(~allowed, -torch.inf).argmax())
        start, stop = divmod(best, len(inside))
        assert contexts[i][offsets[i][start][0] : offsets[i][stop][1]] == one["answer"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_of_an_export_have_the_permissions_of_the_umask(
    models: tiny.Tiny, tmp_path: Path, mask: int
) -> None:
    plan = planned(job(models.bert, tmp_path, tiny.labeled(8)))
    before = os.umask(mask)
    try:
        folder = exported(plan, model_of(plan), tmp_path / "export")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}
    assert "model.safetensors" in modes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_rows_that_hold_nothing_are_answered_with_why(models: tiny.Tiny, tmp_path: Path) -> None:
    _, folder = export(job(models.bert, tmp_path, tiny.labeled(8)), tmp_path)
    inputs: list[Any] = [
        "the film was great",
        {"text": None},
        {"text": 3},
        {"text": " "},
        {"text": "\ud83d"},
    ]
    found = predict(folder, inputs)
    assert "why" not in found[0]
    assert [set(one) for one in found[1:]] == [{"text", "why"}] * 4


def test_words_that_are_none_are_answered_with_why(models: tiny.Tiny, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "film"], "tags": ["O", "B-X"]}] * 4
    _, folder = export(
        job(models.bert, tmp_path, rows, task={"type": "token_classification"}), tmp_path
    )
    found = predict(
        folder, [{"tokens": ["the", ""]}, {"tokens": []}, {"tokens": None}, {"tokens": [1]}]
    )
    assert len(found[0]["tags"]) == 2
    assert all("why" in one for one in found[1:])


def test_a_text_with_a_token_that_is_not_embedded_is_answered_with_why(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer")}
    _, folder = export(job(models.bert, tmp_path, tiny.labeled(8), model=model), tmp_path)
    found = predict(folder, ["the film", "the zebra"])
    assert "why" not in found[0]
    assert "zebra" in found[1]["why"]


@pytest.mark.parametrize("task", ["text_classification", "causal_lm"])
def test_an_export_outlives_the_model_that_it_began_as(
    models: tiny.Tiny, tmp_path: Path, task: str
) -> None:
    source = shutil.copytree(models.gpt2, tmp_path / "base")
    fields = {"task": {"type": task}, "data": {"max_length_tokens": 64}}
    _, folder = export(job(source, tmp_path, tiny.labeled(8), **fields), tmp_path)
    before = predict(folder, ["the film was great"])
    shutil.rmtree(source)
    assert predict(folder, ["the film was great"]) == before
