"""Adapters, and what is trained whole beside them, on every family of models that a task accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.targets import adaptable, head_modules
from orchestrator.model.tuning import merged
from orchestrator.model.weights import checkpoint_fit
from orchestrator.plan.warnings import weight_warnings
from orchestrator.spec import JobSpec, parse_spec

LABELS = ("a", "b", "c")
LORA, IA3, DORA = {"type": "lora"}, {"type": "ia3"}, {"type": "lora", "use_dora": True}
WITHOUT_HEAD = {  # of the encoders: no such class in transformers
    ("token_classification", "bart"),
    ("question_answering", "gemma2"),
}
NO_POSITIONS = {"bloom", "mpt", "mamba", "rwkv"}
ASIDE = ("lora_A", "longformer.")
"""Factors that begin at 0, and layers of a model that rows pass by where they attend to a window only."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    def folder(family: str, causal: bool = False) -> Path:
        found = root / str(causal) / family
        if not found.exists():
            fields = (families.CAUSAL if causal else families.ENCODERS)[family]
            auto = "AutoModelForCausalLM" if causal else "AutoModel"
            families.save(family, fields, found, auto)
        return found

    return folder


def job(folder: Path, task: str, tuning: dict[str, Any], **fields: Any) -> JobSpec:
    packing = {"packing": False} if task == "causal_lm" else {}
    return parse_spec(
        {
            "name": "x",
            "task": {"type": task, **packing},
            "model": {"pretrained": str(folder)},
            "data": {"train": "memory://"},
            "tuning": tuning,
            **fields,
        }
    )


def moving(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def outputs(model: Any, task: str) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, families.VOCABULARY - 1, (2, 16))
    ids[:, -1] = 2  # BART classifies by the end of a text
    mask = {} if task == "causal_lm" else {"attention_mask": torch.ones_like(ids)}
    found = model(input_ids=ids, **mask)
    logits: torch.Tensor = found["start_logits" if "start_logits" in found else "logits"]
    return logits


def check(spec: JobSpec) -> None:
    """What the plan counts is what is trained; head and adapters all learn; merging changes no output."""
    planned, model = build_model(spec, LABELS, on_meta=True), build_model(spec, LABELS)
    assert moving(model) == moving(planned)
    model.train()
    outputs(model, spec.task.type).float().square().sum().backward()
    still = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not any(part in name for part in ASIDE)
        and (parameter.grad is None or not parameter.grad.any())
    ]
    if spec.task.type == "question_answering":  # the loss here looks at where answers start
        still = [name for name in still if "qa_" not in name and "classifier" not in name]
    assert not still
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        apart = outputs(model, spec.task.type)
        folded = outputs(merged(model), spec.task.type)
    torch.testing.assert_close(folded, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


@pytest.mark.parametrize("tuning", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("family", families.ENCODERS)
def test_every_family_classifies_with_adapters(
    folders: Any, family: str, tuning: dict[str, Any]
) -> None:
    spec = job(folders(family), "text_classification", tuning)
    model: Any = build_model(spec, LABELS, on_meta=True)
    heads = head_modules(model.get_base_model())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    of_heads = [n for n in frozen if any(f".{head}." in f".{n}" for head in heads)]
    assert heads
    assert all("original_module" in name for name in of_heads), "the head is trained whole"
    assert not any(
        part in name for name in moving(model) for part in ("word_emb", "embed_tokens", ".wte.")
    )
    check(spec)


@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
@pytest.mark.parametrize(
    "family", ["distilbert", "albert", "modernbert", "camembert", "big_bird", "t5", "qwen2"]
)
def test_other_heads_take_adapters(folders: Any, family: str, task: str) -> None:
    for tuning in (LORA, DORA):
        check(job(folders(family), task, tuning))


@pytest.mark.parametrize("family", [f for f in families.CAUSAL if f not in NO_POSITIONS])
def test_every_language_model_takes_adapters(folders: Any, family: str) -> None:
    for tuning in (LORA, IA3):
        spec = job(folders(family, causal=True), "causal_lm", tuning)
        assert not any("lm_head" in name for name in moving(build_model(spec, (), on_meta=True)))
        check(spec)


def test_layers_that_choose_experts_are_left_alone(folders: Any) -> None:
    plain = job(folders("qwen2_moe", causal=True), "causal_lm", {"type": "full"})
    names = adaptable(build_model(plain, (), on_meta=True))
    assert not [name for name in names if name.endswith("gate") or "lm_head" in name]
    assert any("shared_expert.down_proj" in name for name in names)


def test_a_model_without_linear_layers_has_adapters_on_its_convolutions() -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(depth_multiplier=0.25, image_size=32)
    with torch.device("meta"):
        found = adaptable(MobileNetV1ForImageClassification(config))
    assert found
    assert all(isinstance(m, torch.nn.Conv2d) and m.groups == 1 for m in found.values())


# --- what the checkpoint does not hold


@pytest.mark.parametrize("family", ["bart", "deberta-v2", "roberta", "distilbert"])
@pytest.mark.parametrize(
    "tuning", [LORA, IA3, {"type": "full", "last_layers": 0}], ids=["lora", "ia3", "last_layers"]
)
def test_every_new_parameter_is_trained(folders: Any, family: str, tuning: dict[str, Any]) -> None:
    spec = job(folders(family), "text_classification", tuning)
    plain: Any = build_model(job(folders(family), "text_classification", {"type": "full"}), LABELS)
    new = checkpoint_fit(spec, plain.config, type(plain)).new
    assert new == {n for n, _ in plain.named_parameters() if n.split(".")[0] in head_modules(plain)}
    trained = {n.replace("modules_to_save.default.", "") for n in moving(build_model(spec, LABELS))}
    assert new <= {n.removeprefix("base_model.model.") for n in trained}


@pytest.fixture
def without_pooler(folders: Any, tmp_path: Path) -> Path:
    """A BERT whose checkpoint lacks the pooler, holds one embedding in another shape, and a stray weight."""
    import shutil

    folder = tmp_path / "bert"
    shutil.copytree(folders("bert"), folder)
    file = folder / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if not k.startswith("pooler.")}
    state["encoder.layer.0.extra.weight"] = torch.zeros(3)
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(5, 32)
    save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "tuning",
    [LORA, IA3, {"type": "full", "last_layers": 1}, {"type": "prompt"}],
    ids=["lora", "ia3", "last_layers", "prompt"],
)
def test_new_parameters_in_the_body_are_trained_and_survive_the_export(
    without_pooler: Path, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    spec = job(without_pooler, "text_classification", tuning)
    model: Any = build_model(spec, LABELS)
    assert moving(model) == moving(build_model(spec, LABELS, on_meta=True))
    for part in ("bert.pooler", "token_type_embeddings", "classifier"):
        assert any(part in name for name in moving(model)), part
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        told = outputs(model, "text_classification")
        again: Any = build_model(spec, LABELS).eval()
        held = {n: p for n, p in model.state_dict().items() if n in moving(model)}
        assert not again.load_state_dict(held, strict=False).unexpected_keys
        torch.testing.assert_close(outputs(again, "text_classification"), told)
        if tuning["type"] == "full":
            return
        model.save_pretrained(tmp_path / "adapter")
        from peft import PeftModel

        base = build_model(job(without_pooler, "text_classification", {"type": "full"}), LABELS)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(outputs(loaded, "text_classification"), told)


def test_what_does_not_fit_is_warned_of(without_pooler: Path) -> None:
    spec = job(without_pooler, "text_classification", LORA)
    said = list(weight_warnings(spec, LABELS))
    assert any("encoder.layer.0.extra.weight" in text for text in said)
    frozen = {"type": "full", "freeze": ["bert.*"]}
    spec = job(without_pooler, "text_classification", frozen)
    assert not any("pooler" in name for name in moving(build_model(spec, LABELS)))
    assert any(
        "tuning.freeze holds 3 parameter(s)" in text for text in weight_warnings(spec, LABELS)
    )


def test_a_checkpoint_of_the_same_model_is_warned_of_in_no_way(folders: Any) -> None:
    spec = job(folders("llama", causal=True), "causal_lm", LORA)
    assert not list(weight_warnings(spec, ()))


@pytest.mark.parametrize(
    ("task", "family"), [*WITHOUT_HEAD, ("seq2seq", "bert"), ("causal_lm", "deberta-v2")]
)
def test_a_model_without_the_tasks_head_is_refused_in_one_sentence(
    folders: Any, task: str, family: str
) -> None:
    with pytest.raises(OrchestratorError, match="Models that have it: ") as caught:
        build_model(job(folders(family), task, {"type": "full"}), LABELS, on_meta=True)
    assert len(str(caught.value)) < 400
