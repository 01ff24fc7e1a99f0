"""What a task does with rows: encoding, packing, targets, loss and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.tasks import BadRow, CausalLM, EncodedRow, TextClassification

LABELS = ("bad", "good")
CLASSIFY = TextClassification(type="text_classification", labels=LABELS)
PLAIN = CausalLM(type="causal_lm")


def causal(rows: str, packing: bool = True) -> CausalLM:
    return CausalLM.model_validate(
        {"type": "causal_lm", "rows": {"type": rows}, "packing": packing}
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.bert)


@pytest.fixture(scope="module")
def bytes_(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.llama)


@pytest.fixture(scope="module")
def chat(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.qwen2)


@pytest.fixture(scope="module")
def classifier(models: tiny.Tiny) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(models.bert).eval()


def arrays(rows: Sequence[EncodedRow]) -> list[dict[str, np.ndarray]]:
    """Encoded rows as the stream hands them to `collate`."""
    names = ("input_ids", "is_target", "doc_lengths", "label")
    return [{n: np.asarray(row[n]) for n in names if n in row} for row in rows]


def good(rows: Sequence[EncodedRow | BadRow]) -> list[EncodedRow]:
    """The rows, after making sure that none is bad."""
    assert not any(isinstance(row, BadRow) for row in rows), rows
    return [row for row in rows if not isinstance(row, BadRow)]


# --- text classification


def test_classification_encodes_text_and_label(words: Any) -> None:
    raw = [{"text": "The film was great", "label": "good"}, {"text": "dull", "label": "bad"}]
    first, second = good(CLASSIFY.encode(raw, words, 64, LABELS))
    assert words.decode(first["input_ids"]) == "[CLS] the film was great [SEP]"
    assert (first["label"], second["label"]) == (1, 0)
    assert first["truncated"] == 0


@pytest.mark.parametrize("label", [True, 1, "1"])
def test_labels_of_any_simple_type_are_matched_by_their_text(words: Any, label: Any) -> None:
    task = TextClassification(type="text_classification")
    (row,) = good(task.encode([{"text": "dull", "label": label}], words, 64, ("0", str(label))))
    assert row["label"] == 1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"label": "good"}, "'text' is missing or null"),
        ({"text": None, "label": "good"}, "'text' is missing or null"),
        ({"text": 7, "label": "good"}, "must be text, got int"),
        ({"text": " \n", "label": "good"}, "'text' is empty"),
        ({"text": "half a pair \ud83d", "label": "good"}, "lone surrogate at character 12"),
        ({"text": "dull"}, "'label' is missing"),
        ({"text": "dull", "label": None}, "'label' is missing"),
        ({"text": "dull", "label": ""}, "'label' is missing, null or empty"),
        ({"text": "dull", "label": "odd"}, "unknown label 'odd'; the job knows: 'bad', 'good'"),
    ],
)
def test_a_row_that_cannot_be_used_is_bad_and_leaves_its_neighbors_alone(
    words: Any, row: dict[str, Any], why: str
) -> None:
    fine = {"text": "the film was great", "label": "good"}
    before, bad, after = CLASSIFY.encode([fine, row, fine], words, 64, LABELS)
    assert isinstance(bad, BadRow)
    assert why in bad.why
    assert before == after == good(CLASSIFY.encode([fine], words, 64, LABELS))[0]


def test_only_rows_that_lost_tokens_count_as_truncated(words: Any) -> None:
    raw = [{"text": " ".join(["great"] * n), "label": "good"} for n in (5, 6, 7, 30)]
    rows = good(CLASSIFY.encode(raw, words, 8, LABELS))
    assert [len(r["input_ids"]) for r in rows] == [7, 8, 8, 8]
    assert [r["truncated"] for r in rows] == [0, 0, 1, 1]
    assert rows[3]["input_ids"][-1] == words.sep_token_id, "a cut row still ends like a row"


def test_a_classification_batch_is_padded_and_masked_to_its_longest_row(words: Any) -> None:
    raw = tiny.labeled(5)
    rows = good(CLASSIFY.encode(raw, words, 64, LABELS))
    weights = np.array([1, 1, 1, 1, 0], dtype=np.float32)
    batch = CLASSIFY.collate(arrays(rows), weights, pad_id=0)
    lengths = [len(r["input_ids"]) for r in rows]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())
    assert batch["labels"].tolist() == [r["label"] for r in rows]
    assert batch["weights"].tolist() == weights.tolist()


def test_rows_of_weight_zero_add_exactly_nothing_to_the_loss(words: Any, classifier: Any) -> None:
    rows = arrays(good(CLASSIFY.encode(tiny.labeled(4), words, 64, LABELS)))
    filled = [*rows[:3], rows[0]]
    with torch.no_grad():
        alone = CLASSIFY.loss_sum(classifier, CLASSIFY.collate(rows[:3], np.ones(3), 0))
        other = CLASSIFY.loss_sum(classifier, CLASSIFY.collate(filled, np.array([1, 1, 1, 0]), 0))
        counted = CLASSIFY.loss_sum(classifier, CLASSIFY.collate(filled, np.ones(4), 0))
    assert float(other) == pytest.approx(float(alone), rel=1e-6)
    assert float(counted) > float(alone) + 0.1


def test_padding_never_changes_the_classification_loss(words: Any, classifier: Any) -> None:
    rows = arrays(good(CLASSIFY.encode(tiny.labeled(6, seed=3), words, 64, LABELS)))
    assert len({len(r["input_ids"]) for r in rows}) > 1
    with torch.no_grad():
        together = CLASSIFY.loss_sum(classifier, CLASSIFY.collate(rows, np.ones(6), 0))
        apart = sum(
            CLASSIFY.loss_sum(classifier, CLASSIFY.collate([r], np.ones(1), 0)) for r in rows
        )
    assert float(together) == pytest.approx(float(apart), rel=1e-5)


def test_classification_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, 200), rng.integers(0, 4, 200)
    label[:100] = predicted[:100] % 3
    loss = rng.random(200).astype(np.float32)
    names = ("a", "b", "c", "d")  # `d` never is a true label
    got = CLASSIFY.metrics({"loss": loss, "predicted": predicted, "label": label}, names)
    asked = {"labels": range(4), "average": "macro", "zero_division": 0}
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(label, predicted))
    assert got["f1_macro"] == pytest.approx(sk.f1_score(label, predicted, **asked))
    assert got["precision_macro"] == pytest.approx(sk.precision_score(label, predicted, **asked))
    assert got["recall_macro"] == pytest.approx(sk.recall_score(label, predicted, **asked))
    per_class = sk.f1_score(label, predicted, labels=range(4), average=None, zero_division=0)
    assert list(got["f1_per_class"].values()) == pytest.approx(list(per_class))
    micro = sk.f1_score(label, predicted, labels=range(4), average="micro")
    assert got["f1_micro"] == pytest.approx(micro)
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score)):
        assert got[f"{name}_micro"] == pytest.approx(score(label, predicted, average="micro"))
    assert got["confusion"] == sk.confusion_matrix(label, predicted, labels=range(4)).tolist()
    assert got["loss"] == pytest.approx(float(loss.astype(np.float64).mean()))
    assert set(CLASSIFY.metric_names) <= set(got)


def test_classification_predicts_names_of_labels(words: Any, models: tiny.Tiny) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        models.bert, **CLASSIFY.config_overrides(LABELS)
    ).eval()
    rows = good(CLASSIFY.encode(tiny.labeled(3), words, 64, LABELS))
    with torch.no_grad():
        measured = CLASSIFY.measure(model, CLASSIFY.collate(arrays(rows), np.ones(3), 0))
    predicted = CLASSIFY.predict(model, words, tiny.labeled(3), 64)
    assert [p["label"] for p in predicted] == [LABELS[i] for i in measured["predicted"]]
    assert all(0.5 <= p["score"] <= 1 for p in predicted)


# --- causal language modeling: packing

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def numbered(lengths: Sequence[int]) -> list[EncodedRow]:
    """Documents whose tokens are counted through, so that each can be told from every other."""
    starts = np.cumsum([0, *lengths])
    return [
        {
            "input_ids": list(range(starts[i], starts[i + 1])),
            "is_target": [0] + [1] * (n - 1),
            "doc_lengths": [n],
            "n_targets": n - 1,
            "truncated": 0,
        }
        for i, n in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 16), st.integers(1, 7))
def test_stream_packing_keeps_every_token_once_in_order_and_wastes_none(
    lengths: list[int], max_length: int, at_a_time: int
) -> None:
    rows, out, held = numbered(lengths), [], []
    for i in range(0, len(rows), at_a_time):
        ready, held = PLAIN.pack([*held, *rows[i : i + at_a_time]], max_length)
        out += ready
    assert all(len(row["input_ids"]) == max_length for row in out), "only the rest may be short"
    assert all(len(row["input_ids"]) < max_length for row in held)
    assert len(held) <= 1
    packed = [*out, *held]
    assert [t for row in packed for t in row["input_ids"]] == list(range(sum(lengths)))


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 16), st.integers(1, 7))
def test_stream_packing_keeps_documents_apart_however_the_rows_arrive(
    lengths: list[int], max_length: int, at_a_time: int
) -> None:
    rows, out, held = numbered(lengths), [], []
    for i in range(0, len(rows), at_a_time):
        ready, held = PLAIN.pack([*held, *rows[i : i + at_a_time]], max_length)
        out += ready
    starts = set(np.cumsum([0, *lengths]).tolist())
    for row in [*out, *held]:
        assert sum(row["doc_lengths"]) == len(row["input_ids"])
        assert row["n_targets"] == sum(row["is_target"])
        begins = np.cumsum([0, *row["doc_lengths"]])[:-1].tolist()
        where = {i for i, token in enumerate(row["input_ids"]) if i == 0 or token in starts}
        assert set(begins) == where, "one document ends where the next begins, nowhere else"
        learned = {i for i, on in enumerate(row["is_target"]) if on}
        assert learned == set(range(len(row["input_ids"]))) - where, "all but each first token"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_whole_packing_never_splits_a_document(lengths: list[int]) -> None:
    rows = numbered(lengths)
    packed, held = causal("instruction").pack(rows, 16)
    assert held == []
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) <= 16
        edges = np.cumsum([0, *row["doc_lengths"]])
        for start, stop in pairwise(edges):
            pieces.append((row["input_ids"][start:stop], row["is_target"][start:stop]))
    wanted = [(row["input_ids"], row["is_target"]) for row in rows]
    assert sorted(pieces) == sorted(wanted)
    assert len(packed) <= 2 * math.ceil(sum(lengths) / 16), "first fit leaves few holes"


def test_without_packing_rows_stay_as_they_are() -> None:
    rows = numbered([3, 5])
    assert causal("plain", packing=False).pack(rows, 16) == (rows, [])


# --- causal language modeling: targets


def target_texts(row: EncodedRow, tokenizer: Any) -> list[str]:
    """The text of each run of consecutive targets."""
    runs: list[list[int]] = [[]]
    for token, on in zip(row["input_ids"], row["is_target"], strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


ANSWERS = (
    "good",
    "it was good\nand bright",
    "    if x:\n        return é 😀",
    "two  spaces   and a tail  ",
    "[1, 2]\n\n",
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_targets_of_an_instruction_are_exactly_the_answer(bytes_: Any, answer: str) -> None:
    raw = {"prompt": "was the film good or bad ", "answer": answer}
    (row,) = good(causal("instruction").encode([raw], bytes_, 128, ()))
    assert target_texts(row, bytes_) == [answer + bytes_.eos_token]
    assert bytes_.decode(row["input_ids"]) == raw["prompt"] + answer + bytes_.eos_token


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
def test_targets_of_a_templated_instruction_are_the_answer_and_its_end(
    answer: str, trim_offsets: bool
) -> None:
    tokenizer = tiny.bpe_tokenizer(tiny.CHAT_TEMPLATE, trim_offsets)
    raw = {"prompt": "was the film good or bad ", "answer": answer}
    (row,) = good(causal("instruction").encode([raw], tokenizer, 128, ()))
    assert target_texts(row, tokenizer) == [answer + "<|im_end|>"]


def test_targets_of_a_chat_are_every_assistant_turn_and_nothing_else(chat: Any) -> None:
    messages = [
        {"role": "system", "content": "you are dull"},
        {"role": "user", "content": "was the film good"},
        {"role": "assistant", "content": "it was great"},
        {"role": "user", "content": "it was great"},
        {"role": "assistant", "content": "  so\nwere we"},
        {"role": "user", "content": "again"},
    ]
    (row,) = good(causal("chat").encode([{"messages": messages}], chat, 128, ()))
    assert target_texts(row, chat) == ["it was great<|im_end|>", "  so\nwere we<|im_end|>"]
    assert chat.decode(row["input_ids"]) == chat.apply_chat_template(messages, tokenize=False)


def test_every_token_of_plain_text_but_the_first_is_a_target(bytes_: Any) -> None:
    (row,) = good(PLAIN.encode([{"text": "the film was great"}], bytes_, 128, ()))
    assert row["is_target"] == [0] + [1] * (len(row["input_ids"]) - 1)
    assert row["input_ids"][-1] == bytes_.eos_token_id
    assert row["n_targets"] == len(row["input_ids"]) - 1


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_documents_encoded_together_are_what_each_is_alone(models: tiny.Tiny, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(getattr(models, kind))
    raw = [
        *tiny.documents(4),
        {"text": " "},
        {"text": "[SEP] é 😀"},
        {"text": None},
        {"text": "so"},
    ]
    together = PLAIN.encode(raw, tokenizer, 8, ())
    assert together == [PLAIN.encode([row], tokenizer, 8, ())[0] for row in raw]
    assert [isinstance(row, BadRow) for row in together] == [False] * 4 + [True, False, True, False]
    for row, alone in zip(raw, together, strict=True):
        if not isinstance(alone, BadRow):
            ids = tokenizer(row["text"])["input_ids"]
            assert alone["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize(
    ("rows", "raw", "why"),
    [
        ("plain", {"text": ""}, "'text' is empty"),
        ("instruction", {"prompt": "so", "answer": None}, "'answer' is missing"),
        ("instruction", {"prompt": "so " * 40, "answer": "good"}, "nothing to learn within 16"),
        ("chat", {"messages": "hello"}, "must be a non-empty list"),
        ("chat", {"messages": []}, "must be a non-empty list"),
        ("chat", {"messages": 5}, "must be a non-empty list"),
        ("chat", {"messages": [{"content": "x"}]}, "needs `role` and `content`"),
        ("chat", {"messages": [{"role": "assistant", "content": 3}]}, "must be text"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ],
)
def test_a_row_without_anything_to_learn_is_bad(
    bytes_: Any, rows: str, raw: dict[str, Any], why: str
) -> None:
    (bad,) = causal(rows).encode([raw], bytes_, 16, ())
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_a_chat_without_a_chat_template_is_bad(bytes_: Any) -> None:
    (bad,) = causal("chat").encode(tiny.chats(1), bytes_, 64, ())
    assert isinstance(bad, BadRow)
    assert "no chat template" in bad.why


def test_turns_are_found_where_a_template_rewrites_what_precedes_them() -> None:
    template = "{{ messages[-1]['role'] }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    tokenizer = tiny.bpe_tokenizer(template)
    raw = tiny.chats(8)
    for row, one in zip(good(causal("chat").encode(raw, tokenizer, 64, ())), raw, strict=True):
        answers = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
        assert target_texts(row, tokenizer) == [f"{answer}|" for answer in answers]


def test_a_chat_that_the_template_refuses_is_bad() -> None:
    tokenizer = tiny.bpe_tokenizer("{{ raise_exception('roles must alternate') }}")
    (bad,) = causal("chat").encode(tiny.chats(1), tokenizer, 64, ())
    assert isinstance(bad, BadRow)
    assert "refuses it: roles must alternate" in bad.why


def test_an_over_long_instruction_is_cut_and_counted(bytes_: Any) -> None:
    raw = [{"prompt": "so", "answer": "good " * 40}, {"prompt": "so", "answer": "good"}]
    long, short = good(causal("instruction").encode(raw, bytes_, 16, ()))
    assert (len(long["input_ids"]), long["truncated"], short["truncated"]) == (16, 1, 0)


# --- causal language modeling: loss


def loss_and_grad(task: CausalLM, model: Any, rows: Sequence[EncodedRow]) -> tuple[float, Any]:
    """Loss sum of one batch and the gradient of the input embedding."""
    batch = task.collate(arrays(rows), np.ones(len(rows)), pad_id=0)
    model.zero_grad()
    loss = task.loss_sum(model, batch)
    loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_packing_and_padding_change_neither_loss_nor_gradient(
    models: tiny.Tiny, bytes_: Any, kind: str, attention: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        getattr(models, kind), attn_implementation=attention, dtype=torch.float32
    )
    for parameter in model.parameters():  # far from the flat start, so that attention matters
        torch.nn.init.normal_(parameter, std=0.3)
    task = causal("instruction")
    rows = good(task.encode(tiny.instructions(9, seed=1), bytes_, 96, ()))
    packed, _ = task.pack(rows, 96)
    assert 1 < len(packed) < len(rows)
    assert len({len(p["input_ids"]) for p in packed}) > 1, "some padding is needed to test it"

    alone = [loss_and_grad(task, model, [row]) for row in rows]
    loss, grad = loss_and_grad(task, model, packed)
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    wanted = torch.stack([g for _, g in alone]).sum(0)
    assert torch.allclose(grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    unpacked, _ = loss_and_grad(task, model, rows)
    assert unpacked == pytest.approx(loss, rel=1e-5)


def test_the_same_tokens_as_one_document_have_another_loss(models: tiny.Tiny, bytes_: Any) -> None:
    """Guards the test above: with attention across documents the loss does differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(models.llama, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    task = causal("instruction")
    (packed,), _ = task.pack(good(task.encode(tiny.instructions(2), bytes_, 128, ())), 128)
    joined = {**packed, "doc_lengths": [len(packed["input_ids"])]}
    apart, _ = loss_and_grad(task, model, [packed])
    assert loss_and_grad(task, model, [joined])[0] != pytest.approx(apart, rel=1e-3)


def test_causal_rows_of_weight_zero_count_neither_in_loss_nor_in_targets(
    models: tiny.Tiny, bytes_: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models.llama).eval()
    rows = arrays(good(PLAIN.encode(tiny.documents(3), bytes_, 128, ())))
    with torch.no_grad():
        alone = PLAIN.loss_sum(model, PLAIN.collate(rows[:1], np.ones(1), 0))
        filled = PLAIN.collate(rows, np.array([1, 0, 0]), 0)
        measured = PLAIN.measure(model, filled)
        assert float(PLAIN.loss_sum(model, filled)) == pytest.approx(float(alone), rel=1e-5)
    assert measured["n_targets"].tolist() == [len(rows[0]["input_ids"]) - 1, 0, 0]
    assert measured["loss"][0] == pytest.approx(float(alone), rel=1e-5)
    assert measured["loss"][1:].tolist() == [0, 0]


def test_causal_metrics_weigh_every_target_alike() -> None:
    gathered = {
        "loss": np.array([2.0, 4.0]),
        "n_targets": np.array([1, 5]),
        "n_correct": np.array([1, 2]),
    }
    got = PLAIN.metrics(gathered, ())
    assert got["loss"] == pytest.approx(1.0)
    assert got["perplexity"] == pytest.approx(math.e)
    assert got["token_accuracy"] == pytest.approx(0.5)
    assert set(PLAIN.metric_names) <= set(got)


def test_completion_continues_the_prompt_greedily(models: tiny.Tiny, bytes_: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(models.llama).eval()
    (out,) = PLAIN.predict(model, bytes_, [{"text": "the film was"}], 64)
    ids = bytes_("the film was", return_tensors="pt")["input_ids"]
    first = int(model(input_ids=ids).logits[0, -1].argmax())
    assert out["text"] == "the film was"
    assert out["completion"].startswith(bytes_.decode([first], skip_special_tokens=True))
