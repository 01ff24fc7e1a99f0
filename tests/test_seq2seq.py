"""Text to text: what is learned, what is written, and how it is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import tiny
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.tokenizer import check_tokens, largest_id
from orchestrator.plan.memory import MemorySetup, memory_bytes
from orchestrator.plan.model_stats import model_stats, stats_of
from orchestrator.tasks import BadRow, Seq2Seq
from orchestrator.tasks.base import IGNORED
from orchestrator.tasks.batches import ragged

TASK = Seq2Seq(type="seq2seq", max_target_tokens=12)


@pytest.fixture(scope="module")
def tokenizer(models: tiny.Tiny) -> Any:
    return AutoTokenizer.from_pretrained(models.t5)


@pytest.fixture(scope="module")
def model(models: tiny.Tiny) -> Any:
    model = AutoModelForSeq2SeqLM.from_pretrained(models.t5)
    torch.manual_seed(0)
    for parameter in model.parameters():  # far from the flat start, so that rows differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def arrays(rows: list[Any]) -> list[dict[str, np.ndarray]]:
    return [{n: np.asarray(row[n]) for n in ("input_ids", "label_ids")} for row in rows]


ROWS = [
    {"source": "the film", "target": "great"},
    {"source": "that song was dull again", "target": "so were we"},
    {"source": "her speech", "target": "not good"},
]


def test_both_sides_end_with_the_end_of_text_also_where_they_are_cut(tokenizer: Any) -> None:
    long = "great " * 40
    whole, cut = TASK.encode([ROWS[0], {"source": long, "target": long}], tokenizer, 8, ())
    assert not isinstance(whole, BadRow)
    assert not isinstance(cut, BadRow)
    assert tokenizer.decode(whole["label_ids"]) == "great" + tokenizer.eos_token
    assert (whole["truncated"], cut["truncated"]) == (0, 1)
    assert (len(cut["input_ids"]), len(cut["label_ids"]), cut["n_targets"]) == (8, 12, 12)
    assert cut["label_ids"][-1] == tokenizer.eos_token_id
    assert cut["reference"] == long, "what is written is compared with the whole target"
    assert (TASK.length(cut), TASK.target_length(cut)) == (20, 12)


@pytest.mark.parametrize(
    ("row", "why"), [({"target": "x"}, "'source' is missing"), ({"source": "x"}, "'target' is")]
)
def test_a_row_without_one_side_is_bad(tokenizer: Any, row: dict[str, Any], why: str) -> None:
    (bad,) = TASK.encode([row], tokenizer, 8, ())
    assert isinstance(bad, BadRow)
    assert why in bad.why


def test_the_loss_is_the_one_of_transformers_whatever_the_padding(
    tokenizer: Any, model: Any
) -> None:
    rows = arrays(TASK.encode(ROWS, tokenizer, 32, ()))
    batch = TASK.collate(rows, np.ones(3), 0)
    with torch.no_grad():
        together = float(TASK.loss_sum(model, batch))
        apart = [float(TASK.loss_sum(model, TASK.collate([r], np.ones(1), 0))) for r in rows]
        theirs = float(model(**batch).loss) * int((batch["labels"] != IGNORED).sum())
        without = float(TASK.loss_sum(model, TASK.collate(rows, np.array([1, 0, 1]), 0)))
    assert together == pytest.approx(sum(apart), rel=1e-5)
    assert together == pytest.approx(theirs, rel=1e-5)
    assert without == pytest.approx(apart[0] + apart[2], rel=1e-5)


def test_rows_that_only_fill_the_batch_count_nothing_where_a_model_begins_with_the_last_label(
    tokenizer: Any,
) -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    config = AutoConfig.for_model("mbart", vocab_size=len(tokenizer), pad_token_id=0, **shape)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    rows = arrays(TASK.encode(ROWS, tokenizer, 32, ()))
    with torch.no_grad():
        filled = TASK.collate(rows, np.array([1, 1, 0]), 0)
        alone = TASK.collate(rows[:2], np.ones(2), 0)
        assert float(TASK.loss_sum(model, filled)) == pytest.approx(
            float(TASK.loss_sum(model, alone)), rel=1e-5
        )


def test_an_evaluation_writes_what_a_prediction_writes(tokenizer: Any, model: Any) -> None:
    task = Seq2Seq(type="seq2seq", max_target_tokens=5, prefix="so ", num_beams=2)
    batch = task.collate(arrays(task.encode(ROWS, tokenizer, 32, ())), np.ones(3), 0)
    with torch.no_grad():
        written = task.decode(task.measure(model, batch), tokenizer)["written"]
    predicted = task.predict(model, tokenizer, ROWS, 32)
    assert [p["target"] for p in predicted] == list(written)
    assert len(set(written)) > 1
    assert [p["source"] for p in predicted] == [r["source"] for r in ROWS]


def test_bleu_and_chrf_are_those_of_the_corpus_and_not_a_mean_over_rows() -> None:
    written = ["the cat sat on the mat today", "a dog", "no"]
    reference = ["the cat sat on the mat yesterday", "the dog barked at me", "no"]
    gathered = {
        "written": ragged(written),
        "reference": ragged(reference),
        "loss": np.array([1.0, 2.0, 3.0]),
        "n_targets": np.array([1, 1, 4]),
        "n_correct": np.array([1, 0, 2]),
    }
    got = TASK.metrics(gathered, ())
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [reference]).score)
    means = [
        sacrebleu.corpus_bleu([a], [[b]]).score for a, b in zip(written, reference, strict=True)
    ]
    assert got["bleu"] != pytest.approx(sum(means) / 3, rel=0.01)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(written, [reference]).score)
    # 6 of 7 words on both sides; 1 of 2 against 1 of 5; all
    assert got["rouge1"] == pytest.approx((6 / 7 + 2 * 0.5 * 0.2 / 0.7 + 1) / 3)
    assert (got["loss"], got["token_accuracy"]) == (1.0, 0.5)
    assert set(TASK.metric_names) <= set(got)


def job(models: tiny.Tiny, tmp_path: Path, **config: Any) -> Any:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    given = {"model_type": "t5", "vocab_size": 400, "d_model": 32, "d_ff": 48, "d_kv": 8} | config
    shape = {"num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "eos_token_id": 6}
    model = {"pretrained": None, "config": shape | given, "tokenizer": str(models.t5)}
    return tiny.job(models.t5, rows, tmp_path, task={"type": "seq2seq"}, model=model)


def test_a_model_from_a_config_begins_to_write_with_padding(
    models: tiny.Tiny, tmp_path: Path, tokenizer: Any
) -> None:
    spec = job(models, tmp_path)
    check_tokens(spec, (), tokenizer, largest_id(tokenizer))
    model: Any = build_model(spec, ())
    assert model.config.decoder_start_token_id == model.config.pad_token_id == 0
    facts = model_stats(spec, ())
    assert (facts.layers, facts.decoder_layers, facts.hidden_size) == (3, 2, 32)
    assert facts.intermediate_size == 48
    assert facts.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"vocab_size": 100}, r"embeds 100 tokens.*model.config.vocab_size to \d+"),
        ({"eos_token_id": 3}, r"eos_token_id = 3, but the tokenizer ends texts with 6"),
    ],
)
def test_a_model_that_does_not_share_the_tokenizers_ids_is_refused(
    models: tiny.Tiny, tmp_path: Path, tokenizer: Any, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(OrchestratorError, match=why):
        check_tokens(job(models, tmp_path, **config), (), tokenizer, largest_id(tokenizer))


def shaped(kind: str) -> Any:
    """An encoder-decoder of 2 and 4 layers, without dropout, whose masks take 4 bytes on a CPU."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=400, d_model=256, d_ff=1024, d_kv=64, num_layers=2, num_decoder_layers=4,
                num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
            )
        )  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=400, d_model=256, encoder_ffn_dim=1024, decoder_ffn_dim=1024,
            encoder_layers=2, decoder_layers=4, encoder_attention_heads=4,
            decoder_attention_heads=4, dropout=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_memory_of_an_encoder_decoder_is_what_autograd_keeps(kind: str) -> None:
    """What the forward pass saves for the backward pass, counted, against the plan's estimate."""
    model, rows, source, target = shaped(kind).train(), 4, 48, 24
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ids, labels = (torch.ones(rows, n, dtype=torch.long) for n in (source, target))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model(input_ids=ids, labels=labels)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    setup = MemorySetup(
        world_size=1, stage=0, bf16=False, optimizer_states=2, offload_optimizer=False,
        offload_param=False, bucket_elements=1, gradient_checkpointing=False, on_gpu=False,
        all_logits=True,
    )  # fmt: skip
    estimate = memory_bytes(stats_of(model), setup, rows, source, target)
    saved_logits = estimate["logits"] / 3  # the copy and the gradient come later
    assert measured == pytest.approx(estimate["activations"] + saved_logits, rel=0.1)
