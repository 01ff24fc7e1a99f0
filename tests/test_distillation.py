"""Learning from a teacher: asked once, and a loss that is what its formula says."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as functional
from PIL import Image
from test_plan import LAPTOP, changed, prepared
from test_spec import refused
from test_stopping import BASE

from orchestrator.data import teacher as asking
from orchestrator.data.prepare import Prepared, find_prepared, prepare
from orchestrator.data.shards import open_shards
from orchestrator.data.stream import unpack_rows
from orchestrator.data.teacher import Teacher
from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.parts import PROJECTION
from orchestrator.model.teacher import check_teacher, paired_layers
from orchestrator.model.tokenizer import load_tokenizer
from orchestrator.plan import Plan, make_plan
from orchestrator.remote.package import paths_in
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.train.compare import _measured
from orchestrator.train.objective import Objective

LABELS = ("bad", "good")
WIDTH = 16
Row = dict[str, Any]


@pytest.fixture(scope="module")
def teachers(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Narrow models of three layers, by the task that they were made for."""
    import transformers

    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(1)
    for name, student, head in (
        ("classes", models.bert, transformers.BertForSequenceClassification),
        ("tags", models.bert, transformers.BertForTokenClassification),
        ("number", models.bert, transformers.BertForSequenceClassification),
        ("words", models.llama, transformers.LlamaForCausalLM),
    ):
        config = transformers.AutoConfig.from_pretrained(student)
        config.num_labels = 1 if name == "number" else 2
        config.hidden_size, config.num_hidden_layers, config.initializer_range = WIDTH, 3, 0.5
        config.head_dim = WIDTH // tiny.HEADS
        head(config).save_pretrained(root / name)
        for file in student.glob("tokenizer*"):
            shutil.copy(file, root / name)
    wider = transformers.AutoConfig.from_pretrained(
        models.t5, d_model=WIDTH, initializer_factor=5.0
    )
    transformers.T5ForConditionalGeneration(wider).save_pretrained(root / "texts")
    for file in models.t5.glob("tokenizer*"):
        shutil.copy(file, root / "texts")
    return {path.name: path for path in root.iterdir()}


def job(student: Path, teacher: Path, folder: Path, rows: list[tiny.Row], **fields: Any) -> JobSpec:
    source = tiny.write_jsonl(folder / "rows.jsonl", rows)
    distillation = {"teacher": str(teacher), **fields.pop("distillation", {})}
    return tiny.job(student, source, folder, distillation=distillation, **fields)


class Bench:
    """A job's objective in one process, over eight rows that know the teacher; the last only fills."""

    def __init__(self, spec: JobSpec, raw: list[tiny.Row], labels: tuple[str, ...]) -> None:
        self.plan: Plan = make_plan(spec, LAPTOP, prepared()).model_copy(update={"labels": labels})
        self.teacher = Teacher(spec, labels)
        encoded = spec.task.encode(raw, load_tokenizer(spec), 32, labels)
        self.rows: list[Row] = [{k: np.array(v) for k, v in row.items()} for row in encoded]  # type: ignore[union-attr]
        said = self.teacher.says(self.rows)
        for i, row in enumerate(self.rows):
            row |= {name: arrays[i] for name, arrays in said.items()}
        self.weights = np.array([1.0] * 7 + [0.0], dtype=np.float32)
        self.model: Any = build_model(spec, labels).train()
        self.objective = Objective(self.plan, self.model)

    def losses(self) -> tuple[float, float]:
        """(what is minimized, the task's own loss)."""
        total, own = self.objective(self.model, self.rows, self.weights)
        return float(total.detach()), float(own)

    def scores(self, model: Any) -> Any:
        """Of targets that count."""
        task = self.plan.spec.task
        batch = task.collate(self.rows, self.weights, self.plan.pad_token_id)
        with torch.no_grad():
            found = task.scores(model, batch)
        return found.logits[found.weights > 0]


def softened(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """Kullback-Leibler divergence, teacher to student, of softmax(logits / temperature)."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return float((p * (p / q).log()).sum())


CLASSIFY = {"task": {"type": "text_classification", "labels": ["bad", "good"]}}


def test_the_loss_is_the_share_of_the_labels_and_that_of_the_teacher(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = tiny.labeled(8)
    settings = {"alpha": 0.7, "temperature": 3}
    spec = job(models.bert, teachers["classes"], tmp_path, raw, distillation=settings, **CLASSIFY)
    bench = Bench(spec, raw, LABELS)
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    labels = torch.tensor([int(row["label"]) for row in bench.rows[:7]])
    own = float(functional.cross_entropy(ours, labels, reduction="sum"))
    away = softened(ours, theirs, 3)
    assert away > 0.1
    assert bench.losses() == pytest.approx((0.3 * own + 0.7 * 9 * away, own), rel=1e-4)


def test_with_several_labels_each_one_and_its_absence_are_compared(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = [{**row, "labels": [row["label"]]} for row in tiny.labeled(8)]
    task = {"type": "multi_label_classification", "labels": ["bad", "good"]}
    settings = {"alpha": 0.25, "temperature": 2}
    spec = job(models.bert, teachers["classes"], tmp_path, raw, task=task, distillation=settings)
    bench = Bench(spec, raw, LABELS)
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    wanted = torch.tensor(np.stack([row["label"] for row in bench.rows[:7]])).float()
    losses = functional.binary_cross_entropy_with_logits(ours, wanted, reduction="none")
    own = float(losses.mean(-1).sum())
    pairs = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (ours, theirs)]
    away = softened(pairs[0], pairs[1], 2) / 2  # a sigmoid is a softmax over (logit, 0)
    assert bench.losses() == pytest.approx((0.75 * own + 0.25 * 4 * away, own), rel=1e-4)


def test_a_teachers_number_is_learned_by_the_squared_difference(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = [{**row, "value": float(i)} for i, row in enumerate(tiny.labeled(8))]
    settings = {"alpha": 0.4, "temperature": 3}
    task = {"type": "text_regression"}
    spec = job(models.bert, teachers["number"], tmp_path, raw, task=task, distillation=settings)
    check_teacher(spec, ())
    bench = Bench(spec, raw, ())
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    own = float(((ours.squeeze(-1) - torch.arange(7.0)) ** 2).sum())
    away = float(((ours - theirs) ** 2).sum())
    assert bench.losses() == pytest.approx((0.6 * own + 0.4 * away, own), rel=1e-4)


def test_each_written_word_of_a_translation_has_a_teacher(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = [
        {"source": row["text"], "target": f"{row['text']} {row['label']}"}
        for row in tiny.labeled(8)
    ]
    task = {"type": "seq2seq", "max_target_tokens": 24}
    settings = {"alpha": 1, "temperature": 2, "top_k": 1000}
    spec = job(models.t5, teachers["texts"], tmp_path, raw, task=task, distillation=settings)
    check_teacher(spec, ())
    bench = Bench(spec, raw, ())
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    assert len(ours) == sum(len(row["label_ids"]) for row in bench.rows[:7])
    assert bench.losses()[0] == pytest.approx(4 * softened(ours, theirs, 2), rel=1e-3)
    rows = [{**row, "reference": str(row["reference"])} for row in bench.rows]
    compared = _measured(bench.plan, bench.model.eval(), rows, torch.device("cpu"))
    assert {"bleu", "chrf", "loss"} <= compared["metrics"].keys()
    hidden = job(
        models.t5, teachers["texts"], tmp_path, raw, task=task, distillation={"hidden": {}}
    )
    with pytest.raises(
        OrchestratorError, match=r"distillation\.hidden: needs a model with one stack"
    ):
        check_teacher(hidden, ())


def test_an_image_has_a_teacher_too(tmp_path: Path, models: tiny.Tiny) -> None:
    import transformers

    rng = np.random.default_rng(0)
    raw = [{"image": png(rng), "label": label} for label in ("bad", "good") * 4]
    shape = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    for name, width in (("teacher", 32), ("student", 16), ("large", 16)):
        size = {"image_size": 16} if name == "large" else {}
        config = transformers.ViTConfig(**{**shape, **size}, hidden_size=width, num_hidden_layers=1,
                                        initializer_range=0.5)  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name)
    task = {"type": "image_classification", "size_pixels": 8, "labels": ["bad", "good"]}
    data = {"train": "memory://"}
    settings = {"teacher": str(tmp_path / "teacher"), "alpha": 0.7, "temperature": 3}
    given = {
        "name": "job",
        "task": task,
        "model": {"pretrained": str(tmp_path / "student")},
        "data": data,
    }
    spec = parse_spec({**given, "distillation": settings})
    check_teacher(spec, LABELS)
    bench = Bench(spec, raw, LABELS)
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    labels = torch.tensor([int(row["label"]) for row in bench.rows[:7]])
    own = float(functional.cross_entropy(ours, labels, reduction="sum"))
    assert bench.losses() == pytest.approx(
        (0.3 * own + 0.7 * 9 * softened(ours, theirs, 3), own), rel=1e-4
    )
    other = parse_spec({**given, "distillation": {"teacher": str(tmp_path / "large")}})
    with pytest.raises(OrchestratorError, match="size_pixels"):
        check_teacher(other, LABELS)
    found = refused({**given, "distillation": {**settings, "hidden": {}}})
    assert "reads no text" in found["distillation.hidden"]


def png(rng: np.random.Generator) -> bytes:
    """A picture of noise."""
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_each_word_of_a_tagged_text_has_a_teacher(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = [{"tokens": row["text"].split(), "tags": ["x", "y"] * 20} for row in tiny.labeled(8)]
    raw = [{**row, "tags": row["tags"][: len(row["tokens"])]} for row in raw]
    task = {"type": "token_classification", "labels": ["x", "y"], "entities": False}
    spec = job(models.bert, teachers["tags"], tmp_path, raw, task=task, distillation={"alpha": 1})
    bench = Bench(spec, raw, ("x", "y"))
    away = softened(bench.scores(bench.model), bench.scores(bench.teacher.model), 2)
    assert bench.losses()[0] == pytest.approx(4 * away, rel=1e-4)


@pytest.mark.parametrize("top_k", [400, 5])
def test_a_language_models_words_beyond_the_stored_ones_count_as_one(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path, top_k: int
) -> None:
    raw, task = tiny.documents(8), {"type": "causal_lm", "packing": False}
    settings = {"alpha": 1, "temperature": 2, "top_k": top_k}
    spec = job(models.llama, teachers["words"], tmp_path, raw, task=task, distillation=settings)
    bench = Bench(spec, raw, ())
    ours, theirs = bench.scores(bench.model), bench.scores(bench.teacher.model)
    if top_k == 5:
        best = theirs.topk(5, dim=-1).indices
        ours, theirs = (_and_rest(logits / 2, best) * 2 for logits in (ours, theirs))
    assert bench.losses()[0] == pytest.approx(4 * softened(ours, theirs, 2), rel=1e-3)


def _and_rest(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the kept tokens, and of all others together."""
    p = logits.softmax(-1)
    best = p.gather(-1, kept)
    return torch.cat([best, 1 - best.sum(-1, keepdim=True)], -1).log()


def test_hidden_states_are_compared_through_a_projection_that_is_trained(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = tiny.labeled(8)
    hidden = {"layers": {1: 2, 2: 3}, "weight": 0.5}
    settings = {"alpha": 0, "hidden": hidden}
    spec = job(models.bert, teachers["classes"], tmp_path, raw, distillation=settings, **CLASSIFY)
    bench = Bench(spec, raw, LABELS)
    total, own = bench.losses()
    states = []
    for model in (bench.model, bench.teacher.model):
        batch = spec.task.collate(bench.rows, bench.weights, bench.plan.pad_token_id)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states.append(model(**inputs, output_hidden_states=True).hidden_states)
    expected = 0.0
    for (mine, theirs), projection in zip(
        ((1, 2), (2, 3)), bench.model.get_submodule(PROJECTION), strict=True
    ):
        for i in range(7):
            n = len(bench.rows[i]["input_ids"])
            with torch.no_grad():
                gap = projection(states[0][mine][i, :n]) - states[1][theirs][i, :n]
            expected += float(gap.square().mean()) / 2
    assert total - own == pytest.approx(0.5 * expected, rel=1e-2)  # stored in half precision
    bench.objective(bench.model, bench.rows, bench.weights)[0].backward()
    moved = [p for n, p in bench.model.named_parameters() if n.startswith(PROJECTION)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moved)
    assert bench.plan.model.projection == sum(p.numel() for p in moved) == 2 * 33 * WIDTH


def test_a_batch_that_only_fills_costs_nothing(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    raw = tiny.labeled(8)
    settings = {"hidden": {"layers": "last"}}
    spec = job(models.bert, teachers["classes"], tmp_path, raw, distillation=settings, **CLASSIFY)
    bench = Bench(spec, raw, LABELS)
    bench.weights = np.zeros(8, dtype=np.float32)
    total, _ = bench.objective(bench.model, bench.rows, bench.weights)
    total.backward()
    assert float(total.detach()) == 0
    assert all(
        float(p.grad.abs().sum()) == 0 for p in bench.model.parameters() if p.grad is not None
    )


def test_a_teacher_is_asked_once_and_its_answers_stand_beside_their_rows(
    ray: Any,
    models: tiny.Tiny,
    teachers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "SHARD_ROWS", 8)
    settings: dict[str, Any] = {"hidden": {"layers": {1: 3}}, "teacher_rows": 3}
    spec = job(models.bert, teachers["classes"], tmp_path, tiny.labeled(20), distillation=settings)
    assert find_prepared(spec) is None
    first = prepare(spec)["train"]
    assert first.teacher is not None
    assert (first.teacher.was_ready, len(first.teacher.manifest.shards)) == (False, 3)
    _must_match(spec, first)
    found = find_prepared(spec)
    assert found is not None
    assert found["train"].teacher is not None
    assert found["train"].teacher.folder == first.teacher.folder
    again = prepare(changed(spec, "distillation.temperature=5", "distillation.alpha=0.9"))["train"]
    assert again.teacher is not None
    assert (again.was_ready, again.teacher.was_ready) == (True, True)
    assert find_prepared(changed(spec, "distillation.hidden.layers={1: 2}")) is None
    other = tmp_path / "other"
    shutil.copytree(teachers["classes"], other)
    renamed = changed(spec, f"distillation.teacher={other}")
    assert find_prepared(renamed) is not None, "the same teacher elsewhere"
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert find_prepared(renamed) is None, "another teacher in the same place"


def _must_match(spec: JobSpec, train: Prepared) -> None:
    assert train.teacher is not None
    further = open_shards(train.teacher.folder, train.teacher.manifest)
    reader = open_shards(train.folder, train.manifest, further)
    ids = np.array([17, 3, 3, 8, 0, 19])
    rows, teacher = unpack_rows(reader.take(ids)), Teacher(spec, train.manifest.labels)
    for row in rows:
        for name, (wanted,) in teacher.says([row]).items():
            np.testing.assert_allclose(row[name], wanted, atol=4e-3)
    assert not np.allclose(rows[0]["teacher_logits"], rows[1]["teacher_logits"], atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher": "words"}, r"was not trained for text_classification.*LlamaForCausalLM"),
        ({"teacher": "foreign"}, r"its tokenizer is another one"),
        ({"teacher": "empty"}, r"holds no model"),
        ({"hidden": {"layers": "even"}}, r"3 layers are no multiple of the student's 2"),
        (
            {"hidden": {"layers": {"2": 4}}},
            r"2 → 4, but the student has 2 layers and the teacher 3",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path, fields: Row, words: str
) -> None:
    shutil.copytree(teachers["classes"], tmp_path / "foreign")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "foreign")
    (tmp_path / "empty").mkdir()
    named = fields.get("teacher", "classes")
    path = teachers.get(named, tmp_path / named)
    settings = {**fields, "teacher": str(path)}
    spec = job(models.bert, path, tmp_path, tiny.labeled(4), distillation=settings, **CLASSIFY)
    with pytest.raises(OrchestratorError, match=words):
        _fit(spec)


def _fit(spec: JobSpec) -> None:
    paired_layers(spec)
    check_teacher(spec, LABELS)


def test_a_teacher_of_other_labels_is_refused(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    task = {"type": "text_classification", "labels": ["a", "b", "c"]}
    spec = job(models.bert, teachers["classes"], tmp_path, tiny.labeled(4), task=task)
    with pytest.raises(OrchestratorError, match=r"other labels than a, b, c"):
        check_teacher(spec, ("a", "b", "c"))


def test_a_run_folder_stands_for_its_export(
    models: tiny.Tiny, teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(teachers["classes"], tmp_path / "run" / "export")
    spec = job(models.bert, tmp_path / "run", tmp_path, tiny.labeled(4), **CLASSIFY)
    check_teacher(spec, LABELS)


def test_a_teachers_folder_goes_along_when_a_job_is_submitted(
    models: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.bert, tmp_path / "big" / "model")
    spec = job(models.bert, Path("big/model"), tmp_path, tiny.labeled(4))
    assert "big/model" in paths_in(spec)


TEACHER = {"teacher": "org/teacher"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"task": {"type": "speech_recognition"}, "distillation": TEACHER}, "distillation"),
        ({"distillation": {**TEACHER, "alpha": 0}}, "distillation.alpha"),
        ({**CLASSIFY, "distillation": {**TEACHER, "top_k": 9}}, "distillation.top_k"),
        ({**CLASSIFY, "distillation": TEACHER, "regularization": {"mixup_alpha": 0.2}},
         "regularization.mixup_alpha"),
        ({"distillation": TEACHER, "regularization": {"r_drop_alpha": 1}},
         "regularization.r_drop_alpha"),
        ({"distillation": {"teacher": "./nowhere"}}, "distillation.teacher"),
        ({"distillation": TEACHER,
          "sweep": {"space": {"distillation.alpha": [0.1, 0.9], "distillation.temperature": [1, 2]},
                    "num_trials": 2}},
         "sweep.space.distillation.temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_a_teacher_is_refused(change: Row, field: str) -> None:
    assert list(refused({**BASE, **change})) == [field]
