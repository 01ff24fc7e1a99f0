"""Optimizers: what each does to a weight, what it keeps, which part of a model moves how fast."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from test_plan import LABELS, LAPTOP, changed, prepared

from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.model.build import build_model
from orchestrator.model.parts import groups, hidden_matrices
from orchestrator.plan import describe_cluster, make_plan
from orchestrator.plan.defaults import SOURCES, learning_rate
from orchestrator.plan.fit import optimizer_states
from orchestrator.plan.model_stats import stats_of
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.averaging import AveragingSpec
from orchestrator.spec.optimizers import OptimizerSpec
from orchestrator.spec.schedule import ScheduleSpec
from orchestrator.tasks import TaskSpec
from orchestrator.tasks.preference_losses import PreferenceLossSpec
from orchestrator.train.lion import Lion
from orchestrator.train.optimizer import make_optimizer
from orchestrator.values import model_members

KINDS: dict[str, list[str]] = {
    "adamw": ["optimizer.type=adamw"],
    "adam": ["optimizer.type=adam"],
    "sgd": ["optimizer.type=sgd"],
    "plain-sgd": ["optimizer.type=sgd", "optimizer.momentum=0"],
    "nesterov": ["optimizer.type=sgd", "optimizer.nesterov=true"],
    "rmsprop": ["optimizer.type=rmsprop"],
    "rmsprop-all": [
        "optimizer.type=rmsprop", "optimizer.momentum=0.9", "optimizer.centered=true",
    ],
    "lion": ["optimizer.type=lion"],
    "adafactor": ["optimizer.type=adafactor"],
    "muon": ["optimizer.type=muon"],
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    return tiny.job(models.bert, rows, folder)


def stepped(job: JobSpec) -> tuple[Any, torch.optim.Optimizer]:
    """The job's model after one step of its optimizer on made-up gradients."""
    model = build_model(job, LABELS)
    optimizer = make_optimizer(make_plan(job, LAPTOP, prepared()), model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_state_that_each_optimizer_keeps(spec: JobSpec, kind: str) -> None:
    job = changed(spec, *KINDS[kind])
    model, optimizer = stepped(job)
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    )
    elements = sum(p.numel() for p in model.parameters())
    assert kept / elements == pytest.approx(optimizer_states(job, stats_of(model)), abs=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_moves_every_weight_against_its_gradient(spec: JobSpec, kind: str) -> None:
    job = changed(spec, *KINDS[kind], "optimizer.weight_decay=0")
    before = [p.detach().clone() for p in build_model(job, LABELS).parameters()]
    model, _ = stepped(job)
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad is not None
        against = (old - parameter.detach()) * parameter.grad
        if kind == "muon" and parameter.ndim == 2:
            assert against.sum() > 0, "a matrix moves as a whole"
        else:
            assert (against >= 0).all()
        assert (old != parameter.detach()).float().mean() > 0.9


def test_lion_steps_as_its_paper_says() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([{"params": [weight]}], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    gradients = [torch.tensor([0.5, -1.0, 0.0]), torch.tensor([-0.02, 1.0, 2.0])]
    expected, momentum = [1.0, -2.0, 3.0], [0.0, 0.0, 0.0]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        for i, g in enumerate(gradient.tolist()):
            update = 0.9 * momentum[i] + 0.1 * g
            sign = math.copysign(1, update) if update else 0.0
            expected[i] -= 0.1 * (sign + 0.5 * expected[i])
            momentum[i] = 0.99 * momentum[i] + 0.01 * g
    assert weight.tolist() == pytest.approx(expected)


def test_muon_moves_the_matrices_inside_and_adamw_all_else(spec: JobSpec) -> None:
    """Against torch's two optimizers, each over its own parameters, for three steps."""
    job = changed(spec, "optimizer.type=muon", "optimizer.lr=0.01", "optimizer.weight_decay=0.2")
    model, other = build_model(job, LABELS), build_model(job, LABELS)
    optimizer = make_optimizer(make_plan(job, LAPTOP, prepared()), model)
    named = dict(other.named_parameters())
    outside = [
        n
        for n, p in named.items()
        if p.ndim != 2 or "embeddings" in n or n.startswith("classifier")
    ]
    inside = [p for n, p in named.items() if n not in outside]
    decayed = [named[n] for n in outside if named[n].ndim == 2]
    spared = [named[n] for n in outside if named[n].ndim != 2]
    assert inside, "the test has something to compare"
    plain = [
        torch.optim.Muon(inside, lr=0.01, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.2}, {"params": spared, "weight_decay": 0.0}],
            lr=0.01, fused=True,
        ),
    ]  # fmt: skip
    for step in range(3):
        for one in (model, other):
            torch.manual_seed(step)
            for parameter in one.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for part in plain:
            part.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name


@pytest.mark.parametrize("tuning", [[], ["tuning.type=lora"]])
def test_hidden_matrices_are_no_embeddings_no_head_and_no_vectors(
    spec: JobSpec, tuning: list[str]
) -> None:
    model: Any = build_model(changed(spec, *tuning), LABELS)
    found = hidden_matrices(model)
    assert found
    assert not [n for n in found if "embeddings" in n or "classifier" in n or "bias" in n]
    assert all(dict(model.named_parameters())[n].ndim == 2 for n in found)


def test_weight_decay_is_decoupled_in_adamw_and_coupled_in_adam(spec: JobSpec) -> None:
    """With Adam a penalty is divided by the gradient's size like all else; with AdamW it is not."""
    moved = {}
    for kind in ("adamw", "adam"):
        for decay in (0.0, 0.5):
            job = changed(spec, f"optimizer.type={kind}", f"optimizer.weight_decay={decay}")
            model, _ = stepped(changed(job, "optimizer.lr=0.01"))
            moved[kind, decay] = model.classifier.weight.detach()
    start = build_model(spec, LABELS).classifier.weight.detach()  # type: ignore[union-attr]
    decoupled = moved["adamw", 0.5] - moved["adamw", 0.0]
    torch.testing.assert_close(decoupled, -0.01 * 0.5 * start)
    coupled = (moved["adam", 0.5] - moved["adam", 0.0]).abs()
    assert coupled.mean() < decoupled.abs().mean() / 2


def test_layers_move_slower_the_deeper_they_lie(spec: JobSpec) -> None:
    job = changed(spec, "optimizer.lr=0.001", "optimizer.layer_decay=0.5")
    scales = {n: g.lr_scale for g in groups(build_model(job, LABELS), job, 1e-3) for n in g.names}
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.125
    assert scales["bert.encoder.layer.0.output.dense.weight"] == 0.25
    assert scales["bert.encoder.layer.1.output.LayerNorm.bias"] == 0.5
    assert scales["bert.pooler.dense.weight"] == scales["classifier.weight"] == 1
    plan = make_plan(job, LAPTOP, prepared())
    assert [rate for rate, _ in plan.part_rates] == [0.000125, 0.00025, 0.0005, 0.001]
    assert sum(count for _, count in plan.part_rates) == plan.model.trainable


@pytest.mark.parametrize("tuning", [[], ["tuning.type=lora"]])
def test_the_head_can_have_a_rate_of_its_own(spec: JobSpec, tuning: list[str]) -> None:
    job = changed(spec, *tuning, "optimizer.head_lr=0.01", "optimizer.lr=0.001")
    model: Any = build_model(job, LABELS)
    fast = {n for g in groups(model, job, 1e-3) if g.lr_scale != 1 for n in g.names}
    assert len(fast) == 2
    assert all("classifier" in name for name in fast)


def test_rates_by_part_without_such_a_part_are_refused(
    spec: JobSpec, models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.documents(4))
    tied = tiny.job(
        models.gpt2, rows, tmp_path, task={"type": "causal_lm"}, optimizer={"head_lr": 0.1}
    )
    with pytest.raises(OrchestratorError, match=r"optimizer\.head_lr.*embeddings"):
        make_plan(tied, LAPTOP, prepared())


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
@pytest.mark.parametrize(
    "override", ["zero.stage=1", "zero.stage=2", "zero.stage=3", "zero.offload_optimizer=cpu"]
)
def test_flat_pieces_of_the_weights_are_refused_where_whole_matrices_are_needed(
    spec: JobSpec, override: str, kind: str
) -> None:
    with pytest.raises(SpecError) as refused:
        changed(spec, f"optimizer.type={kind}", override)
    assert [p.field for p in refused.value.problems] == [override.partition("=")[0]]


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_whole_matrices_keep_a_job_at_stage_0_however_little_fits(spec: JobSpec, kind: str) -> None:
    plan = make_plan(
        changed(spec, f"optimizer.type={kind}"), describe_cluster("8xH100x1"), prepared()
    )
    assert plan.stage == 0
    assert "whole matrices" in plan.reasons["stage"]


@pytest.mark.parametrize(
    ("overrides", "rate", "source"),
    [
        ([], 5e-5, "1810.04805"),
        (["tuning.type=lora"], 2e-4, "2106.09685"),
        (["optimizer.type=lion"], 1e-5, "2302.06675"),
        (["optimizer.type=lion", "tuning.type=lora"], 4e-5, "2106.09685"),
        (["optimizer.type=adafactor"], 1e-3, "1910.10683"),
        (["optimizer.type=sgd"], 1e-2, "search optimizer.lr"),
        (["optimizer.type=muon"], 5e-5, "2502.16982"),
        (["optimizer.type=muon", "tuning.type=lora"], 2e-4, "2106.09685"),
    ],
)
def test_a_rate_that_is_left_open_follows_the_kind_of_tuning_and_names_its_source(
    spec: JobSpec, overrides: list[str], rate: float, source: str
) -> None:
    plan = make_plan(changed(spec, *overrides), LAPTOP, prepared())
    assert plan.learning_rate == pytest.approx(rate)
    why = {one.field: one.why for one in plan.defaults}["optimizer.lr"]
    assert source in why
    assert plan.spec.optimizer.lr == "auto", "the spec stays as it was written"


def test_new_weights_get_the_rate_of_the_nearest_size(
    spec: JobSpec, models: tiny.Tiny, tmp_path: Path
) -> None:
    facts = make_plan(spec, LAPTOP, prepared()).model
    config = {"config": {"model_type": "llama"}, "tokenizer": "org/model"}
    task = {"type": "causal_lm"}
    scratch = parse_spec(
        {"name": "job", "task": task, "model": config, "data": {"train": "memory://"}}
    )
    for size, rate in ((1e6, 6e-4), (300e6, 3e-4), (7e9, 1.2e-4)):
        sized = facts.model_copy(update={"parameters": int(size)})
        assert learning_rate(scratch, sized)[0] == rate


def test_what_the_job_sets_is_no_default_and_all_else_has_its_source(spec: JobSpec) -> None:
    job = changed(spec, "optimizer.lr=0.1", "optimizer.betas=[0.8, 0.9]", "gradient_clipping=2")
    fields = {one.field for one in make_plan(job, LAPTOP, prepared()).defaults}
    assert fields == {
        "optimizer.type", "optimizer.eps", "optimizer.weight_decay", "schedule.type", "schedule.warmup_ratio",
    }  # fmt: skip
    warm = changed(job, "schedule.warmup_steps=3")
    assert "schedule.warmup_ratio" not in {
        d.field for d in make_plan(warm, LAPTOP, prepared()).defaults
    }
    assert all(one.why for one in make_plan(spec, LAPTOP, prepared()).defaults)


def test_every_source_belongs_to_a_field() -> None:
    def kind_of(model: Any) -> str:
        return str(get_args(model.model_fields["type"].annotation)[0])

    of_tasks = {f"task.{kind_of(t)}/{name}": why
                for t in model_members(TaskSpec) for name, why in t.sources.items()}  # type: ignore[attr-defined]  # fmt: skip
    assert of_tasks.keys() >= {
        "task.reward_model/center_coefficient",
        "task.question_answering/stride_tokens",
    }
    of_losses = {f"task.loss.{kind_of(one)}/{name}": why
                 for one in model_members(PreferenceLossSpec) for name, why in one.sources.items()}  # type: ignore[attr-defined]  # fmt: skip
    assert of_losses.keys() >= {"task.loss.dpo/beta", "task.loss.simpo/gamma"}
    of_schedules = {f"schedule.{kind_of(s)}/{name}": why
                    for s in model_members(ScheduleSpec) for name, why in s.sources.items()}  # type: ignore[attr-defined]  # fmt: skip
    of_averages = {f"regularization.averaging.{kind_of(a)}/{name}": why
                   for a in model_members(AveragingSpec) for name, why in a.sources.items()}  # type: ignore[attr-defined]  # fmt: skip
    assert len(of_averages) == 2
    assert of_schedules.keys() >= {"schedule.linear/type", "schedule.wsd/warmup_ratio"}
    of_optimizers = {f"optimizer.{kind_of(o)}/{name}": why
                     for o in model_members(OptimizerSpec) for name, why in o.sources.items()}  # type: ignore[attr-defined]  # fmt: skip
    assert of_optimizers.keys() >= {"optimizer.adamw/type", "optimizer.lion/betas"}
    for field, why in (
        SOURCES | of_tasks | of_losses | of_optimizers | of_schedules | of_averages
    ).items():
        section, _, name = field.rpartition(".")
        kind, _, name = name.rpartition("/")
        models: list[Any] = [JobSpec]
        for part in filter(None, section.split(".")):
            models = [n for m in models if part in m.model_fields
                      for n in model_members(m.model_fields[part].annotation)]  # fmt: skip
        kinds = [
            m for m in models if not kind or get_args(m.model_fields["type"].annotation) == (kind,)
        ]
        assert [m for m in kinds if name in m.model_fields], field
        assert why.strip(), field


RATES = [
    ("preference", "llama", "", 1e-6, "2305.18290"),
    ("preference", "llama", "lora", 5e-6, "alignment handbook"),
    ("reward_model", "llama", "", 1e-5, "2307.09288"),
    ("causal_lm", "llama", "", 2e-5, "2307.09288"),
    ("seq2seq", "t5", "", 1e-4, "T5"),
    ("seq2seq", "bart", "", 3e-5, "BART"),
    ("text_classification", "t5", "", 1e-4, "T5"),
    ("token_classification", "bert", "", 5e-5, "1810.04805"),
    ("image_classification", "vit", "", 5e-5, "image classification"),
    ("speech_recognition", "wav2vec2", "", 3e-5, "wav2vec"),
    ("preference", "llama", "new", 6e-4, "2005.14165"),
    ("seq2seq", "t5", "new", 7e-4, "1706.03762"),
    ("text_classification", "bert", "new", 6e-4, "1907.11692"),
    ("image_classification", "vit", "new", 5e-4, "2012.12877"),
    ("speech_recognition", "wav2vec2", "new", 5e-4, "2006.11477"),
]


@pytest.mark.parametrize(("task", "model_type", "how", "rate", "source"), RATES)
def test_each_kind_of_task_and_model_has_a_rate_and_source_of_its_own(
    spec: JobSpec, task: str, model_type: str, how: str, rate: float, source: str
) -> None:
    facts = make_plan(spec, LAPTOP, prepared()).model.model_copy(update={"model_type": model_type})
    job: dict[str, Any] = {"name": "job", "task": {"type": task}, "data": {"train": "memory://"}}
    job["model"] = {"pretrained": "org/model"}
    if how == "new":
        job["model"] = {"config": {"model_type": model_type}, "tokenizer": "org/model"}
    if how == "lora":
        job["tuning"] = {"type": "lora"}
    lr, why = learning_rate(parse_spec(job), facts)
    assert lr == rate
    assert source in why


def test_rows_per_step_that_are_left_open_name_a_source_of_the_task(spec: JobSpec) -> None:
    reason = make_plan(spec, LAPTOP, prepared()).reasons["global_batch_size"]
    assert "1810.04805" in reason
    tasks: list[Any] = model_members(TaskSpec)
    words = {t.__name__: t.default_global_batch_size_source for t in tasks}
    assert "BERT" not in words["PreferenceTuning"] + words["SpeechRecognition"] + words["CausalLM"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adamw", {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}),
        ("adam", {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}),
        ("sgd", {"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}),
        ("rmsprop", {"alpha": 0.5, "eps": 1e-6, "momentum": 0.4, "centered": True}),
        ("lion", {"betas": [0.8, 0.95], "weight_decay": 0.3}),
        ("adafactor", {"decay_rate": -0.7, "clip_threshold": 2.0, "scale_parameter": True}),
        ("muon", {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "weight_decay": 0.3}),
        ("muon", {"betas": [0.8, 0.9], "eps": 1e-6}),
    ],
)
def test_every_setting_reaches_the_optimizer(
    spec: JobSpec, kind: str, settings: dict[str, Any]
) -> None:
    set_to = [f"optimizer.{name}={json.dumps(value)}" for name, value in settings.items()]
    job = changed(spec, f"optimizer.type={kind}", "optimizer.lr=0.5", *set_to)
    optimizer = make_optimizer(make_plan(job, LAPTOP, prepared()), build_model(job, LABELS))
    group = next(g for g in optimizer.param_groups if settings.keys() <= g.keys())
    assert group["lr"] == 0.5
    for name, value in settings.items():
        assert group[name] == (tuple(value) if isinstance(value, list) else value)
