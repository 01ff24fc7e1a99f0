"""Documents that share a row do not see each other, whatever the model's code does with positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers

from orchestrator.errors import OrchestratorError
from orchestrator.model.build import build_model
from orchestrator.model.causal import check_causal, how_packed, settled, teacher_job
from orchestrator.model.probe import probe
from orchestrator.model.shrink import shrunken
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.tasks.base import EncodedRow
from orchestrator.tasks.packing import document, pack_whole

BY_MASK = {"gpt_oss", "falcon", "opt", "mpt", "xglm", "biogpt"}
NOT_AT_ALL = {"granitemoehybrid", "bloom", "mamba", "rwkv", "lfm2"}
LENGTHS = (7, 12, 5, 9, 3)


def job(family: str, kind: str = "causal_lm", **fields: Any) -> JobSpec:
    config = {"model_type": family, **families.CAUSAL[family]}
    return parse_spec(
        {
            "name": "x",
            "task": {"type": kind, **fields.pop("task", {})},
            "model": {"config": config, "tokenizer": "org/model", **fields.pop("model", {})},
            "data": {"train": "memory://"},
            **fields,
        }
    )


def drawn(spec: JobSpec) -> Any:
    """The job's model, with weights large enough for tokens to matter."""
    model: Any = build_model(spec, ()).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.3)
    return model


def documents() -> list[EncodedRow]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, families.VOCABULARY - 1, n).tolist() for n in LENGTHS]
    return [document(ids, [1] * len(ids)) for ids in rows]


def arrays(rows: list[EncodedRow]) -> list[dict[str, np.ndarray]]:
    names = ("input_ids", "is_target", "doc_lengths")
    return [{name: np.array(row[name]) for name in names} for row in rows]


def loss(spec: JobSpec, model: Any, rows: list[EncodedRow]) -> float:
    """Mean loss over all targets, as an evaluation measures it."""
    task = spec.task
    batch = task.collate(arrays(rows), np.ones(len(rows)), 0)
    with torch.no_grad():
        measured = task.measure(model, batch)
    assert measured["n_targets"].sum() == sum(LENGTHS) - len(LENGTHS)
    return float(measured["loss"].sum() / measured["n_targets"].sum())


@pytest.mark.parametrize("family", families.CAUSAL)
def test_packed_rows_have_the_loss_of_rows_alone(family: str) -> None:
    packed, apart = settled(job(family)), job(family, task={"packing": False})
    model = drawn(apart)
    wanted = "mask" if family in BY_MASK else family not in NOT_AT_ALL
    assert packed.task.packing == wanted  # type: ignore[attr-defined]
    rows = documents()
    together = pack_whole(rows, 20) if wanted else rows
    assert len(together) < len(rows) or not wanted
    one_by_one = [loss_of(apart, model, row) for row in rows]
    alone = sum(total for total, _ in one_by_one) / sum(count for _, count in one_by_one)
    assert loss(packed, model, together) == pytest.approx(alone, rel=1e-5)
    assert loss(apart, model, rows) == pytest.approx(alone, rel=1e-5), "padding is no neighbor"


def loss_of(spec: JobSpec, model: Any, row: EncodedRow) -> tuple[float, int]:
    with torch.no_grad():
        measured = spec.task.measure(model, spec.task.collate(arrays([row]), np.ones(1), 0))
    return float(measured["loss"].sum()), int(measured["n_targets"].sum())


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "falcon"])
def test_a_mask_is_needed_where_the_probe_says_so(family: str) -> None:
    spec = job(family)
    model, rows = drawn(spec), documents()
    together = pack_whole(rows, 20)
    assert loss(settled(spec), model, together) == pytest.approx(
        loss(job(family, task={"packing": False}), model, rows), rel=1e-5
    )
    by_positions = loss(spec, model, together)  # as a job that is not settled would
    assert by_positions != pytest.approx(loss(settled(spec), model, together), rel=1e-3)


@pytest.mark.parametrize("family", ["gpt_oss", "falcon"])
def test_masks_work_in_half_precision_and_through_adapters(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    spec = settled(job(family))
    model: Any = get_peft_model(
        drawn(spec), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    together = pack_whole(documents(), 20)
    exact = loss(spec, model, together)
    assert loss(spec, model.to(torch.bfloat16), together) == pytest.approx(exact, rel=0.05)


def test_a_sliding_window_stays_under_a_mask() -> None:
    config = families.config_of("gpt_oss", families.CAUSAL["gpt_oss"])
    wide = families.config_of("gpt_oss", {**families.CAUSAL["gpt_oss"], "sliding_window": 64})
    auto = transformers.AutoModelForCausalLM
    assert shrunken(wide).sliding_window < 9
    assert probe(config, auto).packing == probe(wide, auto).packing == "mask"


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_the_kernel_that_will_be_used_is_probed(family: str, attention: str) -> None:
    spec = job(family, model={"attention": attention})
    packing, why = how_packed(spec)
    if attention == "flash_attention_2":
        assert packing is False
        assert "cannot be probed" in why
    elif family == "llama":
        assert packing is True
    else:  # gpt-oss has no sdpa: no copy can be built, so nothing is known of it
        assert packing == ("mask" if attention == "eager" else False)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlnet", "roformer"])
@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_an_encoder_that_sees_both_sides_is_refused(family: str, task: str) -> None:
    config = {"model_type": family, **families.ENCODERS[family]}
    fields: dict[str, Any] = {
        "name": "x",
        "task": {"type": task},
        "model": {"config": config, "tokenizer": "org/model"},
        "data": {"train": "memory://"},
    }
    with pytest.raises(OrchestratorError, match="attends in both directions") as caught:
        check_causal(parse_spec(fields))
    fixable = "is_decoder: true in model.config" in str(caught.value)
    assert fixable == (family != "xlnet")
    if fixable:
        config["is_decoder"] = True
        check_causal(parse_spec(fields))


@pytest.mark.parametrize("family", families.CAUSAL)
def test_no_decoder_is_refused(family: str) -> None:
    check_causal(job(family, "preference"))


def test_a_teacher_that_cannot_keep_documents_apart_unpacks_the_rows(tmp_path: Path) -> None:
    auto = "AutoModelForCausalLM"
    for teacher, packing, theirs in (("opt", True, "mask"), ("mamba", False, False)):
        folder = families.save(teacher, families.CAUSAL[teacher], tmp_path / teacher, auto)
        spec = settled(job("llama", distillation={"teacher": str(folder)}))
        assert spec.task.packing is packing  # type: ignore[attr-defined]
        assert teacher_job(spec).task.packing == theirs  # type: ignore[attr-defined]


def test_settling_twice_changes_nothing() -> None:
    for family in ("llama", "opt", "mamba"):
        once = settled(job(family))
        assert settled(once) == once


LARGE = ("llama", "qwen3_moe", "deepseek_v3", "gemma3", "phi3", "falcon_h1", "gemma3n_text")


@pytest.mark.parametrize("family", LARGE)
def test_a_config_of_full_size_is_shrunk_to_a_small_one_that_runs(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    small = shrunken(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(small)
    assert sum(p.numel() for p in model.parameters()) < 20_000_000
    found = probe(config, transformers.AutoModelForCausalLM)
    assert found.causal is True
    assert found.packing is (family != "falcon_h1")
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    assert set(getattr(small.get_text_config(), "layer_types", None) or ()) == set(kinds)


def test_evaluation_rows_hold_whole_documents_whatever_is_packed() -> None:
    task = settled(job("llama")).task
    rows = [document(list(range(n)), [1] * n) for n in (3, 7, 12, 25, 5)]
    evaluated, held = task.for_evaluation().pack(rows, 10)
    assert not held
    lengths = sorted(length for row in evaluated for length in row["doc_lengths"])
    assert lengths == sorted([3, 7, 10, 2, 10, 10, 5, 5])
    assert max(len(row["input_ids"]) for row in evaluated) <= 10
    trained, rest = task.pack(rows, 10)
    assert [len(row["input_ids"]) for row in trained] == [10] * 5
    assert sum(len(row["input_ids"]) for row in rest) == 2


def test_a_model_with_fewer_positions_than_a_probe_has_tokens_is_probed() -> None:
    short = {**families.CAUSAL["gpt2"], "n_positions": 8}
    assert (
        probe(families.config_of("gpt2", short), transformers.AutoModelForCausalLM).packing is True
    )
