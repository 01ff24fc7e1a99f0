"""Which weights move: frozen layers, layers that wait, adapters and virtual tokens."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from test_plan import LABELS, LAPTOP, changed, prepared, sized
from transformers import ConvNextConfig, ViTConfig, Wav2Vec2Config

from orchestrator.errors import OrchestratorError, PlanError, SpecError
from orchestrator.model.build import build_model
from orchestrator.model.parts import distances, no_decay
from orchestrator.model.positions import max_length_tokens
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan import Plan, describe_cluster, make_plan
from orchestrator.plan.model_stats import model_stats
from orchestrator.plan.show import show_plan
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.train.engine import set_learning_rate
from orchestrator.train.optimizer import make_optimizer
from orchestrator.train.unfreezing import unfreezing_of

__all__ = ["sized"]  # a fixture
ADAPTERS = {
    "lora": ["tuning.type=lora"],
    "dora": ["tuning.type=lora", "tuning.use_dora=true"],
    "ia3": ["tuning.type=ia3"],
    "prompt": ["tuning={type: prompt, num_virtual_tokens: 5}"],
    "prompt-text": ["tuning={type: prompt, num_virtual_tokens: 5, init_text: the film was}"],
    "prefix": ["tuning={type: prefix, num_virtual_tokens: 5}"],
    "projection": ["tuning={type: prefix, num_virtual_tokens: 5, prefix_projection: true}"],
}
H, N = tiny.HIDDEN, tiny.LAYERS
NAMED: dict[str, Any] = {
    "name": "job", "model": {"pretrained": "org/model"}, "data": {"train": "memory://"},
}  # fmt: skip
CAUSAL = "task={type: causal_lm, packing: false}"


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    return tiny.job(models.bert, rows, folder)


def scattered(model: Any) -> Any:
    """The model with trained-looking values in what moves."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def moving(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- adapters


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_an_adapter_is_put_on_without_warnings_of_libraries(spec: JobSpec, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        build_model(changed(spec, *ADAPTERS[kind]), LABELS)


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        ("lora", N * 2 * 8 * (H + H)),
        ("dora", N * 2 * (8 * (H + H) + H)),
        ("ia3", N * (H + H + H + 2 * H)),  # keys, values, inputs of both output layers
        ("prompt", 5 * H),
        ("prompt-text", 5 * H),
        ("prefix", 5 * N * 2 * H),
        ("projection", 5 * H + (H + 1) * H + (H + 1) * N * 2 * H),
    ],
)
def test_an_adapter_trains_what_its_paper_says_and_the_head(
    spec: JobSpec, kind: str, trained: int
) -> None:
    job = changed(spec, *ADAPTERS[kind])
    facts, model = model_stats(job, LABELS), build_model(job, LABELS)
    head = (H + 1) * len(LABELS)
    assert facts.trainable == trained + head
    assert facts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (
        not set(model.state_dict())
        - {name for name, _ in model.named_parameters()}
        - {name for name, _ in model.named_buffers()}
    ), "nothing is saved twice"


def test_rslora_scales_by_the_root_of_the_rank(spec: JobSpec) -> None:
    scales = {}
    for rslora in ("false", "true"):
        tuning = f"tuning={{type: lora, r: 4, lora_alpha: 6, use_rslora: {rslora}}}"
        model: Any = build_model(changed(spec, tuning), LABELS)
        found = {
            m.scaling["default"]
            for m in model.modules()
            if isinstance(getattr(m, "scaling", None), dict)
        }
        (scales[rslora],) = found
    assert scales == {"false": 6 / 4, "true": 6 / 4**0.5}


IMAGES = {"type": "image_classification", "size_pixels": 8, "labels": LABELS}
OTHERS: dict[str, tuple[dict[str, Any], Any, str, torch.Tensor]] = {
    "vit": (
        IMAGES,
        ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                  num_attention_heads=2),
        "classifier", torch.randn(2, 3, 8, 8),
    ),
    "convnext": (
        IMAGES, ConvNextConfig(image_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
        "classifier", torch.randn(2, 3, 8, 8),
    ),
    "wav2vec2": (
        {"type": "speech_recognition", "frame_samples": 20, "labels": ["a", "b"]},
        Wav2Vec2Config(**tiny.WAVE_SHAPE), "lm_head", torch.randn(2, 400),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_on_images_and_sound_train_the_head_and_merge(kind: str, tmp_path: Path) -> None:
    task, config, head, values = OTHERS[kind]
    auto = JobSpec.model_validate({**NAMED, "task": task}).task.auto_class
    getattr(transformers, auto).from_config(config).save_pretrained(tmp_path)
    tuning = {"type": "lora", "r": 2}
    job = parse_spec(
        {**NAMED, "task": task, "model": {"pretrained": str(tmp_path)}, "tuning": tuning}
    )
    # In fp64: normalizing values that hardly differ magnifies rounding.
    model: Any = scattered(build_model(job, LABELS)).double()
    values = values.double()
    assert {n.split(".")[-1] if "lora_" not in n else "lora" for n in moving(model)} == {
        "weight", "bias", "lora",
    }  # fmt: skip
    trained_whole = {n for n in moving(model) if "lora_" not in n}
    assert all(f"{head}.modules_to_save" in n for n in trained_whole)
    assert head not in model_stats(job, LABELS).adapted_modules
    with torch.no_grad():
        adapted = model(values).logits
        merged: Any = model.merge_and_unload()
        torch.testing.assert_close(adapted, merged(values).logits)
    merged.save_pretrained(tmp_path / "merged")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "merged").eval()
    assert again.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(adapted, again(values).logits)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("task", ["text_classification", "question_answering"])
def test_a_merged_model_is_the_adapted_one(spec: JobSpec, kind: str, task: str) -> None:
    job = changed(spec, *ADAPTERS[kind], f"task={{type: {task}}}")
    model: Any = scattered(build_model(job, LABELS))
    batch = {
        "input_ids": torch.arange(7, 17)[None],
        "attention_mask": torch.ones(1, 10, dtype=torch.long),
    }
    if task == "question_answering":
        batch["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 6])
    with torch.no_grad():
        adapted = model(**batch)
        merged = model.merge_and_unload()(**batch)
    torch.testing.assert_close(adapted[0], merged[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_kept_apart_is_what_peft_loads(spec: JobSpec, kind: str, tmp_path: Path) -> None:
    job = changed(spec, *ADAPTERS[kind])
    model: Any = scattered(build_model(job, LABELS))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(spec, LABELS), str(tmp_path)).eval()
    batch = {"input_ids": torch.arange(7, 17)[None], "attention_mask": torch.ones(1, 10)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
        whole = build_model(spec, LABELS).eval()(**batch).logits  # type: ignore[operator]
    assert not torch.allclose(loaded(**batch).logits, whole, atol=1e-4), "it says something else"


TEXT = {"text": "the film was great", "label": "good"}
UNPACKED = {"type": "causal_lm", "packing": False}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {"type": "text_classification"}, TEXT),
    "llama": ("llama", {"type": "text_classification"}, TEXT),
    "tags": ("bert", {"type": "token_classification"}, {"tokens": ["the", "film"], "tags": ["O", "B-X"]}),
    "lm-gpt2": ("gpt2", UNPACKED, TEXT),
    "lm-llama": ("llama", UNPACKED, TEXT),
    "lm-qwen2": ("qwen2", UNPACKED, TEXT),
    "t5": ("t5", {"type": "seq2seq", "max_target_tokens": 12}, {"source": "the film", "target": "so were we"}),
}  # fmt: skip
"""Model, task and a row."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [("prompt", name) for name in TASKS if name != "llama"] + [("prefix", name) for name in TASKS],
)  # a prompt before a llama that classifies is refused, see below
def test_padding_behind_a_text_changes_nothing_beside_virtual_tokens(
    spec: JobSpec, models: tiny.Tiny, kind: str, name: str
) -> None:
    folder, task, row = TASKS[name]
    job = changed(
        spec,
        *ADAPTERS[kind],
        f"model.pretrained={getattr(models, folder)}",
        f"task={json.dumps(task)}",
    )
    labels = ("O", "B-X") if name == "tags" else LABELS
    model, tokenizer = scattered(build_model(job, labels)), load_tokenizer(job)
    model.config.pad_token_id = tokenizer.pad_token_id
    longer = {
        k: v * 4 if isinstance(v, list) else v if k == "label" else " ".join([v] * 4)
        for k, v in row.items()
    }
    encoded: list[Any] = job.task.encode([row, longer], tokenizer, 48, labels)
    rows = [{k: np.asarray(v) for k, v in one.items()} for one in encoded]
    found = []
    for together in (rows[:1], rows):
        weights = np.ones(len(together), np.float32)
        batch = job.task.collate(together, weights, tokenizer.pad_token_id)
        with torch.no_grad():
            found.append(job.task.measure(model, batch))
    alone, beside = found
    np.testing.assert_allclose(alone["loss"][0], beside["loss"][0], rtol=1e-4)
    if name == "t5":
        first, second = alone["written"][0], beside["written"][0]
        assert list(second[: len(first)]) == list(first)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_language_model_with_virtual_tokens_writes(
    spec: JobSpec, models: tiny.Tiny, kind: str
) -> None:
    """Greedily, what the same model says token by token without a cache."""
    job = changed(spec, *ADAPTERS[kind], f"model.pretrained={models.llama}", CAUSAL)
    model: Any = scattered(build_model(job, ()))
    tokenizer = load_tokenizer(job)
    (said,) = job.task.predict(model, tokenizer, [{"text": "the film was"}], 48)
    ids = tokenizer("the film was", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    written = tokenizer("the film was" + said["completion"], return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == tokenizer.decode(written[0])[: len(tokenizer.decode(ids[0]))]


def test_virtual_tokens_take_positions_and_memory_of_a_text(
    spec: JobSpec, models: tiny.Tiny
) -> None:
    job = changed(spec, "tuning={type: prompt, num_virtual_tokens: 24}")
    assert (max_length_tokens(spec), max_length_tokens(job)) == (64, 40)
    need = {
        name: make_plan(one, LAPTOP, prepared(longest=32)).memory_bytes["activations"]
        for name, one in (("plain", spec), ("prompt", job))
    }
    assert need["prompt"] == pytest.approx(need["plain"] * (32 + 24) / 32, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "field", "why"),
    [
        (["tuning.type=prefix", "task={type: causal_lm}"], "task.packing", "first document alone"),
        (["tuning.type=prompt", "task={type: preference}"], "tuning.type", "untouched model"),
        (["tuning={type: prefix, merge_on_export: true}"], "tuning.merge_on_export", "nothing to fold"),
        (["tuning.type=prefix", "gradient_checkpointing=true"], "gradient_checkpointing", "prefix"),
        (["tuning={type: ia3, target_modules: [key]}"], "tuning.feedforward_modules", "given where"),
        (["tuning={type: ia3, target_modules: [key], feedforward_modules: [dense]}"],
         "tuning.feedforward_modules", "no target module"),
        (["tuning.type=prefix", "task={type: image_classification}"], "tuning.type", "does not read"),
    ],
)  # fmt: skip
def test_a_tuning_that_cannot_be_right_is_refused_before_anything_is_loaded(
    spec: JobSpec, overrides: list[str], field: str, why: str
) -> None:
    with pytest.raises(SpecError) as caught:
        changed(spec, *overrides)
    assert {p.field: p.why for p in caught.value.problems}[field].find(why) >= 0


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["tuning.type=prompt", "model.pretrained={llama}"], "last token"),
        (["tuning.type=prefix", "model.pretrained={t5}"], "no past_key_values"),
        (["tuning.type=ia3", "tuning.target_modules=[nothing]", "tuning.feedforward_modules=[]"],
         "tuning.target_modules: .* here: "),
        (["tuning.type=lora", "tuning.target_modules=[nothing]"], "here: .*dense, key, query, value"),
        (["tuning.last_layers=9"], "last_layers = 9: the model has 2 layers"),
        (["tuning.last_layers=0", "model.pretrained={gpt2}", CAUSAL, "tuning.freeze=['*ln_f*']"],
         "nothing to train"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_tuned_like_that_is_refused(
    spec: JobSpec, models: tiny.Tiny, overrides: list[str], why: str
) -> None:
    folders = {"llama": models.llama, "gpt2": models.gpt2, "t5": models.t5}
    filled = [o.format(**folders) if "pretrained" in o else o for o in overrides]
    with pytest.raises(OrchestratorError, match=why):
        model_stats(changed(spec, *filled), LABELS)


def test_factors_that_begin_at_one_are_not_decayed_to_zero(spec: JobSpec) -> None:
    model = build_model(changed(spec, "tuning.type=ia3"), LABELS)
    factors = [(n, p) for n, p in model.named_parameters() if "ia3" in n]
    assert factors
    assert all(no_decay(name, tuple(p.shape)) for name, p in factors)


def test_a_rate_for_the_head_leaves_virtual_tokens_alone(spec: JobSpec) -> None:
    job = changed(spec, *ADAPTERS["prompt"], "optimizer.head_lr=0.5", "optimizer.lr=0.1")
    optimizer = make_optimizer(make_plan(job, LAPTOP, prepared()), build_model(job, LABELS))
    sizes = {g["lr"]: sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert sizes[0.1] == 5 * H


@pytest.mark.parametrize(
    ("overrides", "rate", "source"),
    [
        (ADAPTERS["dora"], 2e-4, "DoRA"),
        (ADAPTERS["ia3"], 3e-3, "2205.05638"),
        ([*ADAPTERS["ia3"], "optimizer.type=adafactor"], 3e-3, "2205.05638"),
        (ADAPTERS["prompt"], 3e-2, "peft"),
        ([*ADAPTERS["prompt"], "optimizer.type=adafactor"], 0.3, "2104.08691"),
        (ADAPTERS["prefix"], 1e-2, "peft"),
    ],
)
def test_each_adapter_has_a_rate_of_its_own(
    spec: JobSpec, overrides: list[str], rate: float, source: str
) -> None:
    plan = make_plan(changed(spec, *overrides), LAPTOP, prepared())
    assert plan.learning_rate == rate
    assert source in {one.field: one.why for one in plan.defaults}["optimizer.lr"]


# --- layers


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("bert", "text_classification", {
            "bert.embeddings.word_embeddings.weight": 3, "bert.encoder.layer.0.output.dense.weight": 2,
            "bert.encoder.layer.1.output.dense.weight": 1, "bert.pooler.dense.weight": 0,
            "classifier.bias": 0,
        }),
        ("gpt2", "causal_lm", {
            "transformer.wpe.weight": 3, "transformer.h.1.ln_1.bias": 1, "transformer.ln_f.weight": 0,
        }),
        ("t5", "seq2seq", {
            "shared.weight": 3, "encoder.block.0.layer.0.SelfAttention.q.weight": 2,
            "encoder.block.1.layer.0.SelfAttention.q.weight": 1,
            "decoder.block.0.layer.0.SelfAttention.q.weight": 2,
            "decoder.block.1.layer.2.layer_norm.weight": 1, "encoder.final_layer_norm.weight": 0,
        }),
    ],
)  # fmt: skip
def test_layers_are_counted_from_the_top(
    spec: JobSpec, models: tiny.Tiny, name: str, task: str, expected: dict[str, int]
) -> None:
    job = changed(spec, f"model.pretrained={getattr(models, name)}", f"task={{type: {task}}}")
    names = [n for n, _ in build_model(job, LABELS).named_parameters()]
    found = distances(names, "tuning.last_layers")
    assert {n: found[n] for n in expected} == expected


def test_an_encoders_first_embeddings_and_a_decoders_lie_below_their_own_layers() -> None:
    names = ["model.shared.weight", "model.encoder.layers.0.a", "model.encoder.layers.1.a",
             "model.encoder.norm", "model.decoder.positions", "model.decoder.layers.0.a",
             "model.decoder.norm", "lm_head.weight"]  # fmt: skip
    assert list(distances(names, "f").values()) == [3, 2, 1, 0, 3, 1, 0, 0]


@pytest.mark.parametrize(("layers", "moved"), [(0, []), (1, ["1"]), (2, ["0", "1"])])
def test_only_the_last_layers_and_the_head_move(
    spec: JobSpec, layers: int, moved: list[str]
) -> None:
    job = changed(spec, f"tuning.last_layers={layers}")
    model: Any = build_model(job, LABELS)
    wanted = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("classifier", "bert.pooler"))
        or any(f"layer.{layer}." in name for layer in moved)
    }
    assert moving(model) == wanted
    assert model_stats(job, LABELS).trainable == sum(
        p.numel() for n, p in model.named_parameters() if n in wanted
    )


def shown(plan: Plan) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show_plan(plan))
    return console.export_text()


def gradual(spec: JobSpec, *overrides: str) -> Plan:
    job = changed(spec, "tuning.unfreeze_every_steps=2", "schedule.type=constant",
                  "optimizer.lr=0.01", "optimizer.weight_decay=0.1", "stop.max_steps=12", *overrides)  # fmt: skip
    return make_plan(job, LAPTOP, prepared())


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "rmsprop", "lion", "adafactor"])
def test_a_layer_that_waits_is_as_if_it_needed_no_gradient(spec: JobSpec, kind: str) -> None:
    """Compared with a model whose layers get `requires_grad` one by one, as ULMFiT has it."""
    plan = gradual(spec, f"optimizer.type={kind}", "tuning.last_layers=1")
    ours, theirs = build_model(plan.spec, plan.labels), build_model(plan.spec, plan.labels)
    depth = distances([n for n, _ in theirs.named_parameters()], "")
    first, second = make_optimizer(plan, ours), make_optimizer(plan, theirs)
    engine = SimpleNamespace(optimizer=first, unfreezing=unfreezing_of(plan, ours, first))
    batch = {"input_ids": torch.arange(7, 17)[None], "attention_mask": torch.ones(1, 10)}
    begun = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(7):
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_(depth[name] <= 1 + step // 2)
        set_learning_rate(engine, plan, step)
        norms = []
        for model, optimizer in ((ours, first), (theirs, second)):
            model(**batch).logits.pow(2).sum().backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)  # what is clipped
        for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if not name.endswith(
                "key.bias"
            ):  # softmax does not see it: its gradient is rounding alone
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"{step} {name}")
            waits = depth[name] > 1 + step // 2
            assert torch.equal(one, begun[name]) >= waits, "it does not even decay"


def test_the_plan_says_when_layers_begin_to_move_and_what_that_costs(spec: JobSpec) -> None:
    plan = gradual(spec)
    full = make_plan(spec, LAPTOP, prepared())
    assert plan.model.trainable == full.model.trainable
    assert plan.memory_bytes["optimizer"] == full.memory_bytes["optimizer"]
    assert plan.checkpoint_bytes == full.checkpoint_bytes
    text = shown(plan)
    assert "the head, one layer more every 2 steps" in text
    assert "all move from step 7" in text
    assert "held from the first step" in text
    assert "after the last one" in shown(gradual(spec, "stop.max_steps=5"))


# --- a base in 4 bits

QLORA = ["tuning={type: lora, quantization: nf4}"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["resources.gpus_per_worker=0"], "tuning.quantization"),
        (["zero.stage=3"], "zero.stage"),
        (["zero.offload_param=cpu"], "zero.offload_param"),
        (["model.gguf_file=model.gguf"], "model.gguf_file"),
    ],
)
def test_what_4_bits_cannot_be_is_refused(spec: JobSpec, overrides: list[str], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        changed(spec, *QLORA, *overrides)
    assert field in {p.field for p in caught.value.problems}


def test_4_bits_without_a_gpu_are_refused_with_the_name_of_the_extra(
    spec: JobSpec, models: tiny.Tiny
) -> None:
    with pytest.raises(PlanError, match="qlora"):
        make_plan(changed(spec, *QLORA), LAPTOP, prepared())
    if not torch.cuda.is_available():
        with pytest.raises(OrchestratorError, match="GPUs only"):
            build_model(changed(spec, *QLORA), LABELS)


def test_the_plan_counts_what_is_held_in_4_bits(spec: JobSpec, models: tiny.Tiny) -> None:
    task = "task={type: causal_lm}"
    lora = changed(spec, "tuning.type=lora", f"model.pretrained={models.llama}", task)
    qlora = changed(lora, *QLORA)
    cluster = describe_cluster("2xH100x1")
    plain, quantized = (make_plan(job, cluster, prepared()) for job in (lora, qlora))
    attention, feed_forward = (
        3 * H * H,
        3 * H * 2 * H,
    )  # queries and outputs; keys and values of half the heads
    assert quantized.model.quantized == N * (attention + feed_forward)
    assert quantized.model.trainable == plain.model.trainable
    assert quantized.model.parameters == plain.model.parameters
    saved = plain.memory_bytes["parameters"] - quantized.memory_bytes["parameters"]
    assert saved == pytest.approx(quantized.model.quantized * (2 - 0.516), rel=1e-3)
    assert quantized.stage < 3
    assert (quantized.learning_rate, plain.learning_rate) == (2e-4, 2e-4)
    assert "2305.14314" in {d.field: d.why for d in quantized.defaults}["optimizer.lr"]


def test_no_stage_that_cuts_weights_up_is_chosen_for_4_bits(spec: JobSpec, sized: Any) -> None:
    sized(400_000_000_000)
    job = changed(spec, *QLORA, "batch.micro_batch_size=1")
    with pytest.raises(PlanError, match="ZeRO stage 2"):
        make_plan(job, describe_cluster("8xH100x1"), prepared())
