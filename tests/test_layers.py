"""Models that keep only some of their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_plan import LABELS, LAPTOP, changed, prepared
from test_spec import refused
from test_stopping import BASE

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.config import load_config
from orchestrator.plan import make_plan
from orchestrator.plan.warnings import config_warnings
from orchestrator.spec import JobSpec

WORDS = torch.arange(8, 20).view(2, 6)


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    return tiny.job(models.bert, rows, folder)


class Skipped(torch.nn.Module):
    """A layer that is not there."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return states


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=WORDS).logits


def test_the_layers_that_stay_compute_what_they_computed(spec: JobSpec, tmp_path: Path) -> None:
    whole: Any = build_model(spec, LABELS)
    kept: Any = build_model(changed(spec, "model.keep_layers=[1]"), LABELS)
    by_hand: Any = build_model(spec, LABELS)
    by_hand.bert.encoder.layer[0] = Skipped()
    assert torch.equal(logits(kept), logits(by_hand))
    assert not torch.equal(logits(kept), logits(whole))
    kept.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, len(loaded.bert.encoder.layer)) == (1, 1)
    assert torch.equal(logits(loaded), logits(kept))


def test_no_layer_is_left_out_by_chance_as_workers_would_not_agree_on_it(
    spec: JobSpec, models: tiny.Tiny, tmp_path: Path
) -> None:
    config = {"model_type": "wav2vec2", **tiny.WAVE_SHAPE}
    written = {
        "model": {"config": {**config, "layerdrop": 0.1}},
        "task": {"type": "speech_recognition"},
    }
    assert "layerdrop: 0" in refused({**BASE, **written})["model.config.layerdrop"]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 400}
    heads = {
        f"{side}_{n}": 2 for side in ("encoder", "decoder") for n in ("attention_heads", "ffn_dim")
    }
    made = transformers.M2M100Config(**sizes, **heads, max_position_embeddings=64, pad_token_id=0)
    made.save_pretrained(tmp_path / "m2m")
    job = changed(
        spec, f"model.pretrained={tmp_path / 'm2m'}", f"model.tokenizer={models.llama}",
        "task={type: seq2seq, source_column: text, target_column: label}",
    )  # fmt: skip
    assert made.encoder_layerdrop == 0.05
    config_used = load_config(job, ())
    assert (config_used.encoder_layerdrop, config_used.decoder_layerdrop) == (0.0, 0.0)
    warnings = config_warnings(job)
    assert [w.split(" of the model")[0] for w in warnings] == [
        "encoder_layerdrop = 0.05", "decoder_layerdrop = 0.05",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_shortened_language_model_still_writes(
    models: tiny.Tiny, tmp_path: Path, family: str
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.documents(4))
    task = {"type": "causal_lm"}
    folder, keep = getattr(models, family), {"keep_layers": [1]}
    model: Any = build_model(tiny.job(folder, rows, tmp_path, task=task, model=keep), ())
    model.eval()
    written = model.generate(WORDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for position in range(WORDS.shape[1], written.shape[1]):  # the cache agrees with a fresh pass
        with torch.no_grad():
            following = model(input_ids=written[:, :position]).logits[:, -1].argmax(-1)
        assert torch.equal(following, written[:, position])


def test_the_plan_counts_the_layers_that_are_left(spec: JobSpec) -> None:
    whole = make_plan(spec, LAPTOP, prepared()).model
    left = make_plan(changed(spec, "model.keep_layers=[0]"), LAPTOP, prepared()).model
    layer = sum(p.numel() for p in build_model(spec, LABELS).bert.encoder.layer[0].parameters())  # type: ignore[union-attr, operator]
    assert (left.layers, left.parameters) == (whole.layers - 1, whole.parameters - layer)


def test_a_layer_that_does_not_exist_is_named_with_the_limit(spec: JobSpec) -> None:
    with pytest.raises(OrchestratorError, match=r"keep_layers = 2: bert has 2 layers, 0 to 1"):
        build_model(changed(spec, "model.keep_layers=[0, 2]"), LABELS, on_meta=True)


def test_a_model_of_two_stacks_or_of_several_kinds_of_layers_is_refused(
    models: tiny.Tiny, spec: JobSpec, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.documents(4))
    task = {"type": "seq2seq", "source_column": "text", "target_column": "text"}
    two = tiny.job(models.t5, rows, tmp_path, task=task, model={"keep_layers": [0]})
    with pytest.raises(OrchestratorError, match=r"one stack of layers, and t5 has 2 \(encoder"):
        build_model(two, (), on_meta=True)
    config = transformers.ModernBertConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    transformers.ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "modern")
    odd = changed(spec, f"model.pretrained={tmp_path / 'modern'}", "model.keep_layers=[1, 2]")
    with pytest.raises(OrchestratorError, match=r"layers of several kinds"):
        build_model(odd, LABELS, on_meta=True)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"model": {"pretrained": "org/model", "keep_layers": [2, 0]}}, "model.keep_layers", "ascending"),
        ({"model": {"pretrained": "org/model", "keep_layers": [0, 0]}}, "model.keep_layers", "once"),
        ({"model": {"pretrained": "org/model", "keep_layers": []}}, "model.keep_layers", "at least 1"),
        ({"model": {"config": {"model_type": "llama"}, "tokenizer": "org/model", "keep_layers": [0]}},
         "model.keep_layers", "num_hidden_layers"),
        ({"model": {"pretrained": "org/model", "keep_layers": [0]},
          "tuning": {"type": "lora", "merge_on_export": False}}, "tuning.merge_on_export", "keep_layers"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_kept_are_refused(
    change: dict[str, Any], field: str, words: str
) -> None:
    found = refused({**BASE, **change})
    assert list(found) == [field]
    assert words in found[field]
