"""Regularization: each knob's arithmetic on one process, against formulas written down here."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as functional
from test_plan import LABELS, LAPTOP, changed, prepared
from test_spec import refused
from test_stopping import BASE
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from orchestrator.errors import OrchestratorError, PlanError
from orchestrator.model.build import build_model
from orchestrator.model.config import load_config
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan import Plan, make_plan
from orchestrator.plan.show_learning import learning
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.regularization import RegularizationSpec
from orchestrator.tasks.base import Scores
from orchestrator.tasks.image_classification import ImageClassification
from orchestrator.train.averaging import AVERAGE, Averager, add_l1, average_share
from orchestrator.train.noise import EmbeddingHook, neftune_noise
from orchestrator.train.objective import Objective, _divergence, _partners, masked

SEVERAL = {"type": "multi_label_classification", "labels_column": "label"}


@pytest.fixture(scope="module")
def spec(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("job")
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4))
    return tiny.job(models.bert, rows, folder)


def rows_of(spec: JobSpec, count: int) -> list[dict[str, np.ndarray]]:
    tokenizer = load_tokenizer(spec)
    encoded = spec.task.encode(tiny.labeled(count, seed=3), tokenizer, 32, LABELS)
    return [{k: np.array(v) for k, v in row.items()} for row in encoded]  # type: ignore[union-attr]


class Bench:
    """A job's objective over a model in one process, with eight rows of which the last only fills."""

    def __init__(self, spec: JobSpec, *overrides: str, dropout: float = 0.0) -> None:
        job = changed(spec, f"model.dropout={dropout}", *overrides)
        self.plan: Plan = make_plan(job, LAPTOP, prepared())
        self.model: Any = build_model(job, LABELS).train()
        self.objective = Objective(self.plan, self.model)
        self.rows = rows_of(job, 8)
        self.weights = np.array([1.0] * 7 + [0.0], dtype=np.float32)
        self.labels = torch.tensor(np.stack([row["label"] for row in self.rows]))

    def losses(self) -> tuple[float, float]:
        """(what is minimized, the task's own loss)."""
        torch.manual_seed(0)
        np.random.seed(0)
        total, own = self.objective(self.model, self.rows, self.weights)
        return float(total.detach()), float(own)

    def logits(self) -> torch.Tensor:
        """Of the seven rows that count."""
        batch = self.plan.spec.task.collate(self.rows, self.weights, self.plan.pad_token_id)
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        return self.model(**batch).logits[:7].detach()


def test_without_regularization_the_tasks_loss_is_minimized(spec: JobSpec) -> None:
    bench = Bench(spec)
    expected = functional.cross_entropy(bench.logits(), bench.labels[:7], reduction="sum")
    assert bench.losses() == pytest.approx((float(expected), float(expected)))


def test_label_smoothing_gives_all_classes_a_share_in_training_alone(spec: JobSpec) -> None:
    bench = Bench(spec, "regularization.label_smoothing=0.2")
    log_p = functional.log_softmax(bench.logits(), dim=-1)
    truth = -log_p[torch.arange(7), bench.labels[:7]]
    total, own = bench.losses()
    assert total == pytest.approx(float((0.8 * truth + 0.2 * -log_p.mean(-1)).sum()), rel=1e-5)
    assert own == pytest.approx(float(truth.sum()), rel=1e-5)


def test_yes_and_no_of_each_label_are_smoothed_as_two_classes(spec: JobSpec) -> None:
    several = parse_spec(
        {**spec.model_dump(mode="json", exclude_unset=True), "task": {**SEVERAL, "labels": LABELS}}
    )
    bench = Bench(several, "regularization.label_smoothing=0.2")
    logits, truth = bench.logits(), bench.labels[:7].float()
    assert set(truth.flatten().tolist()) == {0.0, 1.0}
    yes, no = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    plain = -(truth * yes + (1 - truth) * no)
    total, own = bench.losses()
    smoothed = 0.8 * plain - 0.2 * (yes + no) / 2
    assert total == pytest.approx(float(smoothed.mean(-1).sum()), rel=1e-5)
    assert own == pytest.approx(float(plain.mean(-1).sum()), rel=1e-5)


def test_a_rows_loss_is_weighted_by_its_class(spec: JobSpec) -> None:
    bench = Bench(spec, "regularization.class_weights={good: 3}")
    assert bench.plan.class_weights == (1.0, 3.0)
    each = functional.cross_entropy(bench.logits(), bench.labels[:7], reduction="none")
    weights = torch.tensor([3.0 if label == 1 else 1.0 for label in bench.labels[:7]])
    total, own = bench.losses()
    assert total == pytest.approx(float((each * weights).sum()), rel=1e-5)
    assert own == pytest.approx(float(each.sum()), rel=1e-5)


def test_r_drop_pulls_the_predictions_of_two_passes_together(spec: JobSpec) -> None:
    alike = Bench(spec, "regularization.r_drop_alpha=4", "model.dropout=0.5")
    alike.model.eval()  # no dropout: both passes are the same
    truth = functional.cross_entropy(alike.logits(), alike.labels[:7], reduction="sum")
    assert alike.losses() == pytest.approx((float(truth), float(truth)), rel=1e-5)
    alphas = (1.0, 4.0)
    apart = [Bench(spec, f"regularization.r_drop_alpha={a}", dropout=0.5).losses() for a in alphas]
    divergence = [(total - own) / a for (total, own), a in zip(apart, alphas, strict=True)]
    assert divergence[0] > 1e-4
    assert divergence[0] == pytest.approx(divergence[1], rel=1e-3)


def test_r_drop_pulls_labels_and_numbers_together_too() -> None:
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0], [0.5, 1.0]])  # 2 rows, twice
    scores = Scores(logits, torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 0.0]))  # the second fills
    p, q = logits[0].sigmoid(), logits[2].sigmoid()
    each = [(a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()) for a, b in ((p, q), (q, p))]
    expected = float((each[0] + each[1]).mean() / 2)
    assert float(_divergence(scores, "labels")) == pytest.approx(expected, rel=1e-5)
    assert float(_divergence(scores, "number")) == pytest.approx(2.0**2 + 2.0**2)


def test_r_drop_without_any_dropout_is_refused(spec: JobSpec) -> None:
    with pytest.raises(PlanError, match=r"r_drop_alpha.*model\.dropout"):
        make_plan(changed(spec, "regularization.r_drop_alpha=1"), LAPTOP, prepared())


def test_noise_is_as_large_as_neftune_says_and_only_in_training(spec: JobSpec) -> None:
    noise = neftune_noise(torch.zeros(4, 9, 16), alpha=6.0)
    assert noise.abs().max() <= 6 / math.sqrt(9 * 16)
    assert noise.abs().max() > 5.5 / math.sqrt(9 * 16)
    assert noise.mean().abs() < 0.05
    bench = Bench(spec, "regularization.neftune_alpha=5")
    plain = Bench(spec)
    assert not torch.equal(bench.logits(), plain.logits())
    assert torch.equal(_in_evaluation(bench), _in_evaluation(plain))


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_noise_and_mixing_reach_both_sides_of_an_encoder_and_a_decoder(model_type: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "decoder_start_token_id": 0}
    if model_type != "t5":
        sides = {f"{side}_{name}": n for side in ("encoder", "decoder")
                 for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
        sizes |= {**sides, "max_position_embeddings": 32, "pad_token_id": 1, "dropout": 0.0}
    else:
        sizes |= {"d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model: Any = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **sizes))
    hook = EmbeddingHook(model.train(), None, "regularization.neftune_alpha")
    fixed, words = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[7, 8, 2], [9, 10, 2]])
    for sides in ((words, fixed), (fixed, words)):
        inputs = dict(zip(("input_ids", "decoder_input_ids"), sides, strict=True))
        plain = model(**inputs).logits
        hook.mix = (torch.tensor([1, 0]), 0.25)
        assert not torch.allclose(model(**inputs).logits, plain)
        hook.mix, hook.neftune_alpha = None, 5
        assert not torch.allclose(model(**inputs).logits, plain)
        hook.neftune_alpha = None


def _in_evaluation(bench: Bench) -> torch.Tensor:
    bench.model.eval()
    return bench.logits()


def test_masking_hides_a_share_of_the_words_and_no_special_token(spec: JobSpec) -> None:
    plan = make_plan(changed(spec, "regularization.token_dropout=0.3"), LAPTOP, prepared())
    tokenizer = load_tokenizer(spec)
    assert plan.mask_token_id == tokenizer.unk_token_id, "this tokenizer has no mask token"
    assert "unknown token" in plan.reasons["mask_token_id"]
    torch.manual_seed(0)
    words = torch.randint(8, len(tokenizer), (50, 40))
    words[:, 0], words[:, -1] = tokenizer.cls_token_id, tokenizer.pad_token_id
    hidden = masked(words, plan, 0.3)
    assert torch.equal(hidden[:, 0], words[:, 0])
    assert torch.equal(hidden[:, -1], words[:, -1])
    changed_words = hidden[:, 1:-1] != words[:, 1:-1]
    assert changed_words.float().mean() == pytest.approx(0.3, abs=0.03)
    assert set(hidden[:, 1:-1][changed_words].tolist()) == {plan.mask_token_id}


def test_masking_leaves_what_a_language_model_predicts(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.documents(4))
    job = tiny.job(models.llama, rows, tmp_path, task={"type": "causal_lm"})
    hiding = changed(job, "regularization.token_dropout=0.9")
    with pytest.raises(PlanError, match="neither a mask token nor an unknown token"):
        make_plan(hiding, LAPTOP, prepared())
    plan = make_plan(job, LAPTOP, prepared()).model_copy(
        update={"spec": hiding, "mask_token_id": 1}
    )
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        type(job.task), "loss_sum", lambda *args: seen.update(args[2]) or torch.zeros(())
    )
    words = np.arange(10, 60)
    row = {"input_ids": words, "is_target": np.ones(50), "doc_lengths": np.array([50])}
    Objective(plan, None)(SimpleNamespace(device="cpu"), [row], np.ones(1))
    assert (seen["input_ids"] == 1).float().mean() > 0.7
    assert seen["labels"][0].tolist() == words.tolist()


def test_mixup_is_the_share_of_two_rows_losses_on_mixed_embeddings(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.random, "beta", lambda *_: 1.0)
    whole = Bench(spec, "regularization.mixup_alpha=0.4").losses()
    assert whole == pytest.approx(Bench(spec).losses(), rel=1e-5)
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.25)
    partner = torch.tensor([3, 2, 1, 0, 6, 5, 4, 7])  # the last one only fills
    monkeypatch.setattr(torch, "randperm", lambda count: partner[:count])
    bench = Bench(spec, "regularization.mixup_alpha=0.4")
    for row in bench.rows:  # one length, so that no padding is mixed in
        row["input_ids"] = np.resize(row["input_ids"], 7)
    ids = torch.tensor(np.stack([row["input_ids"] for row in bench.rows]))
    words = bench.model.get_input_embeddings()(ids).detach()
    mixed = 0.25 * words + 0.75 * words[partner]
    logits = bench.model(inputs_embeds=mixed).logits.detach()
    own, other = (
        functional.cross_entropy(logits, labels, reduction="none")[:7].sum()
        for labels in (bench.labels, bench.labels[partner])
    )
    assert bench.losses()[0] == pytest.approx(float(0.25 * own + 0.75 * other), rel=1e-5)


def test_images_are_mixed_pixel_by_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.25)
    monkeypatch.setattr(torch, "randperm", lambda _: torch.tensor([1, 0]))
    task = ImageClassification(type="image_classification")
    settings = RegularizationSpec(mixup_alpha=0.4)
    plan: Any = SimpleNamespace(
        spec=SimpleNamespace(task=task, regularization=settings, distillation=None),
        class_weights=(),
    )
    batch = {
        "pixel_values": torch.tensor([[0.0], [1.0]]),
        "labels": torch.tensor([0, 1]),
        "weights": torch.ones(2),
    }
    mixed, partner, share = Objective(plan, None)._mixed(batch)
    assert mixed["pixel_values"].tolist() == [[0.75], [0.25]]
    assert partner is not None
    assert (partner.tolist(), share) == ([1, 0], 0.25)


@pytest.mark.parametrize("counting", [0, 1, 2, 5])
def test_rows_that_only_fill_are_nobodys_partner(counting: int) -> None:
    weights = torch.zeros(8)
    weights[torch.randperm(8)[:counting]] = 1
    partner = _partners(weights)
    assert sorted(partner.tolist()) == list(range(8))
    assert (weights[partner] == weights).all()


def test_mixing_in_micro_batches_of_one_row_is_refused(spec: JobSpec) -> None:
    one = changed(spec, "regularization.mixup_alpha=0.4", "batch.micro_batch_size=1")
    with pytest.raises(PlanError, match=r"mixup_alpha.*one row here.*batch\.micro_batch_size"):
        make_plan(one, LAPTOP, prepared())
    few = changed(spec, "regularization.mixup_alpha=0.4", "batch.global_batch_size=2")
    with pytest.raises(PlanError, match="1 rows go to each worker"):
        make_plan(few, LAPTOP, prepared())


def test_a_model_without_token_embeddings_is_refused(spec: JobSpec) -> None:
    job = changed(spec, "regularization.neftune_alpha=5")
    plan = make_plan(job, LAPTOP, prepared())
    images: Any = SimpleNamespace(
        get_input_embeddings=lambda: torch.nn.Linear(1, 1), config=SimpleNamespace(model_type="vit")
    )
    with pytest.raises(OrchestratorError, match=r"neftune_alpha: vit has no token embeddings"):
        Objective(plan, images)


def test_l1_brings_weights_to_exactly_zero_and_spares_biases() -> None:
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(50, 50) * 0.1), torch.nn.Parameter(torch.ones(9))
    groups = [
        {"params": [weight], "spared": False, "lr": 0.5},
        {"params": [bias], "spared": True, "lr": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    add_l1(optimizer, 0.04)
    before = weight.detach().clone()
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    expected = before.sign() * (before.abs() - 0.02).clamp(min=0)
    torch.testing.assert_close(weight.detach(), expected)
    assert 0.1 < (weight == 0).float().mean() < 0.3
    assert torch.equal(bias, torch.ones(9))


@pytest.mark.parametrize(
    "averaging",
    ["{type: ema, decay: 0.9}", "{type: swa, start_ratio: 0.4, every_steps: 3}"],
)
def test_an_average_is_what_its_definition_says(spec: JobSpec, averaging: str) -> None:
    job = changed(spec, f"regularization.averaging={averaging}", "stop.max_steps=20")
    plan = make_plan(job, LAPTOP, prepared())
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [weight], "spared": False}], lr=1.0)
    averager = Averager(optimizer)
    history = []
    for step in range(20):
        averager.share = average_share(plan, step)
        weight.grad = torch.full((3,), float(step % 5) - 1.5)
        optimizer.step()
        history.append(weight.detach().clone())
    if "ema" in averaging:
        expected = history[0]
        for step, value in enumerate(history[1:], 1):
            keep = min(0.9, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * value
    else:  # from step 8 of 20 on, every third: after steps 11, 14, 17 and 20
        expected = torch.stack([history[i - 1] for i in (11, 14, 17, 20)]).mean(0)
    torch.testing.assert_close(optimizer.state[weight][AVERAGE], expected)
    assert not torch.allclose(expected, history[-1])
    averager.exchange()
    torch.testing.assert_close(weight.detach(), expected)
    averager.exchange()
    assert torch.equal(weight.detach(), history[-1])


@pytest.mark.parametrize(
    ("averaging", "epochs", "points"),
    [
        ("", 1, 4),
        ("", 3, 12),
        ("", 100, 25),
        (", every_steps: epoch", 3, 0),
        (", every_steps: epoch", 5, 1),
    ],
)
def test_a_stochastic_average_has_points_or_the_plan_says_so(
    spec: JobSpec, averaging: str, epochs: int, points: int
) -> None:
    job = changed(
        spec, f"regularization.averaging={{type: swa{averaging}}}", f"stop.max_epochs={epochs}",
        "batch.global_batch_size=64",
    )  # fmt: skip
    plan = make_plan(job, LAPTOP, prepared(1000))
    shares = [average_share(plan, step) for step in range(plan.total_steps)]
    last_copy = max(step for step, share in enumerate(shares) if share == 1)
    averaged = sum(0 < share < 1 for share in shares) + (last_copy != plan.total_steps - 1)
    assert averaged == points
    assert f"{points} points" in next(v for name, v, _ in learning(plan) if "average" in name)
    warned = [w for w in plan.warnings if "averaging" in w]
    assert len(warned) == (points < 2)
    assert not points or not warned or "one point, step 76" in warned[0]


def test_before_its_start_a_stochastic_average_is_the_weights(spec: JobSpec) -> None:
    job = changed(spec, "regularization.averaging={type: swa}", "stop.max_steps=100")
    plan = make_plan(job, LAPTOP, prepared())
    assert {average_share(plan, step) for step in range(75)} == {1.0}


def test_memory_and_checkpoints_count_the_average_and_the_second_pass(spec: JobSpec) -> None:
    plain = make_plan(spec, LAPTOP, prepared())
    ema = make_plan(changed(spec, "regularization.averaging.type=ema"), LAPTOP, prepared())
    size = 4 * plain.model.trainable
    assert ema.memory_bytes["optimizer"] - plain.memory_bytes["optimizer"] == size
    assert ema.checkpoint_bytes - plain.checkpoint_bytes == 2 * size
    twice = changed(spec, "regularization.r_drop_alpha=1", "model.dropout=0.1")
    assert make_plan(twice, LAPTOP, prepared()).memory_bytes["activations"] == (
        2 * plain.memory_bytes["activations"]
    )


def test_dropout_is_set_by_name_too(spec: JobSpec) -> None:
    config = load_config(changed(spec, "model.dropout={hidden_dropout_prob: 0.3}"), LABELS)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.0)
    with pytest.raises(OrchestratorError, match=r"no 'resid_pdrop'.*hidden_dropout_prob"):
        load_config(changed(spec, "model.dropout={resid_pdrop: 0.3}"), LABELS)


def test_a_dropout_that_the_config_leaves_to_others_can_be_set_and_one_without_any_is_refused(
    spec: JobSpec,
) -> None:
    assert load_config(spec, LABELS).classifier_dropout is None
    config = load_config(changed(spec, "model.dropout={classifier_dropout: 0.3}"), LABELS)
    assert (config.classifier_dropout, config.hidden_dropout_prob) == (0.3, 0.0)
    images = {"type": "image_classification", "size_pixels": 32, "labels": LABELS}
    shape = {"model_type": "convnext", "image_size": 32}
    job = parse_spec({**BASE, "task": images, "model": {"config": shape, "dropout": 0.1}})
    with pytest.raises(OrchestratorError, match="convnext has no dropout"):
        load_config(job, LABELS)


CLASSIFY = {"task": {"type": "text_classification", "labels": ["a", "b"]}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"regularization": {"class_weights": "balanced"}}, "regularization.class_weights"),
        ({"task": {"type": "text_regression"}, "regularization": {"class_weights": "balanced"}},
         "regularization.class_weights"),
        ({"regularization": {"mixup_alpha": 0.2}}, "regularization.mixup_alpha"),
        ({**CLASSIFY, "regularization": {"class_weights": {}}}, "regularization.class_weights"),
        ({**CLASSIFY, "regularization": {"class_weights": {"c": 2}}},
         "regularization.class_weights"),
        ({**CLASSIFY, "regularization": {"mixup_alpha": 0.2, "r_drop_alpha": 1}},
         "regularization.mixup_alpha"),
        ({"regularization": {"r_drop_alpha": 1},
          "model": {"pretrained": "org/model", "dropout": 0}}, "regularization.r_drop_alpha"),
        ({"task": {"type": "text_regression"}, "regularization": {"label_smoothing": 0.1}},
         "regularization.label_smoothing"),
        ({"task": {"type": "question_answering"}, "regularization": {"r_drop_alpha": 1}},
         "regularization.r_drop_alpha"),
        ({"regularization": {"averaging": {"type": "ema", "decay": 1}}},
         "regularization.averaging.decay"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(change: dict[str, Any], field: str) -> None:
    assert list(refused({**BASE, **change})) == [field]


@pytest.mark.parametrize("field", ["neftune_alpha", "token_dropout"])
def test_noise_on_words_is_refused_where_a_task_reads_none(
    field: str,
) -> None:
    task = {"task": {"type": "image_classification"}}
    found = refused({**BASE, **task, "regularization": {field: 0.5}})
    assert "works on words" in found[f"regularization.{field}"]


def test_a_class_weight_for_a_label_that_the_data_lacks_is_refused(spec: JobSpec) -> None:
    with pytest.raises(PlanError, match=r"'ugly' is no label of this data"):
        make_plan(changed(spec, "regularization.class_weights={ugly: 2}"), LAPTOP, prepared())
