"""What `plan` shows: every setting the job makes, with its meaning, and what follows from it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import tiny
from rich.console import Console
from test_plan import LAPTOP, changed, prepared

from orchestrator.plan import Plan, make_plan
from orchestrator.plan.settings import SECTIONS, settings
from orchestrator.plan.show import show_plan
from orchestrator.spec import JobSpec
from orchestrator.spec.validation_errors import first_sentence

RICH: dict[str, list[str]] = {
    "full": [
        "tuning={unfreeze_every_steps: 3, freeze: ['*LayerNorm*']}",
        "optimizer={type: sgd, lr: 0.1, nesterov: true, layer_decay: 0.9, head_lr: 0.2}",
        "schedule={type: cosine, restarts: 1, warmup_steps: 2}",
        "regularization={r_drop_alpha: 1, token_dropout: 0.1, averaging: {type: swa, start_ratio: 0.5}, "
        "class_weights: {good: 3}}",
        "stop={max_time_s: 60, target: 0.9, max_epochs: 2}",
        "model.dropout=0.1",
        "gradient_clipping=0.5",
        "data.eval=memory://",
    ],
    "lora": ["tuning={type: lora, r: 4, use_rslora: true}", "schedule={type: plateau, patience: 3}",
             "data.eval=memory://", "regularization.averaging={type: ema, decay: 0.9}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def plans(models: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    folder = tmp_path_factory.mktemp("job")
    spec = tiny.job(models.bert, tiny.write_jsonl(folder / "rows.jsonl", tiny.labeled(4)), folder)
    jobs = {name: changed(spec, *overrides) for name, overrides in RICH.items()}
    return {name: make_plan(job, LAPTOP, prepared(400, eval_rows=40)) for name, job in jobs.items()}


def screen(plan: Plan) -> str:
    """The plan as a wide terminal shows it, spaces joined."""
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(show_plan(plan))
    return " ".join(console.export_text().split())


def leaves(value: Any, path: str = "") -> set[str]:
    """Dotted paths of everything that a section sets."""
    if isinstance(value, dict) and path not in (
        "model.dropout", "regularization.class_weights", "model.config",
    ):  # fmt: skip
        return {p for k, v in value.items() for p in leaves(v, f"{path}.{k}".lstrip("."))}
    return {path}


@pytest.mark.parametrize("name", RICH)
def test_every_setting_of_the_job_is_shown_with_what_it_means(
    name: str, plans: dict[str, Plan]
) -> None:
    plan = plans[name]
    written = plan.spec.model_dump(mode="json", exclude_unset=True, include=set(SECTIONS))
    assert {one.field for one in plan.settings} == leaves(written)
    text = screen(plan)
    for one in plan.settings:
        assert one.why, one.field
        assert f"{one.field} {one.value} {one.why}" in text


def test_what_is_left_open_is_no_setting_and_what_is_set_no_default(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        assert not {s.field for s in plan.settings} & {d.field for d in plan.defaults}
        for one in plan.defaults:
            assert f"{one.field} {one.value} default, because: {one.why}" in screen(plan)


def test_the_screen_shows_what_follows_from_the_settings(plans: dict[str, Plan]) -> None:
    full, lora = screen(plans["full"]), screen(plans["lora"])
    for words in (
        "optimizer sgd, lr 0.1",
        "rates by part 0.0",
        "unfreezing the head, one layer more every 3 steps",
        "schedule cosine, 2 warm-up steps",
        "r-drop alpha 1 every row stands twice",
        "token dropout 10% of the words",
        "class weights bad 1, good 3",
        "swa: 13 points after step 13, every 1 steps",
        "learning rate by step 0.1 ┤",
        "set by the job task.type text_classification",
    ):
        assert words in full, words
    for words in (
        "adapters on query, value tuning.target_modules: auto",
        "tuning.r 4 Rank of the update",
        "at most: times 0.5 whenever accuracy got no better in 3 evaluations",
        "average of the weights ema, decay 0.9",
        "optimizer.lr 0.0002 default, because: adapters: Hu et al.",
    ):
        assert words in lora, words


def test_the_plan_names_the_step_from_which_each_layer_moves(plans: dict[str, Plan]) -> None:
    assert plans["full"].unfreezing == ((1, 0), (4, 1), (7, 2), (10, 3))
    assert plans["lora"].unfreezing == ()


def test_a_setting_that_the_job_does_not_make_is_not_listed() -> None:
    data = {"name": "job", "task": {"type": "causal_lm"}, "model": {"pretrained": "org/model"}}
    spec = JobSpec.model_validate({**data, "data": {"train": "memory://"}})
    assert [(s.field, s.value) for s in settings(spec)] == [
        ("task.type", "causal_lm"), ("model.pretrained", "org/model"),
    ]  # fmt: skip


def test_a_meaning_is_the_first_sentence() -> None:
    assert (
        first_sentence("Low rank (Hu et al., 2106); frozen.\nMore. Yet more.")
        == "Low rank (Hu et al., 2106); frozen"
    )
    assert (
        first_sentence("Adds 0.5 to it, as X et al. Did. `auto`: 1.")
        == "Adds 0.5 to it, as X et al. Did"
    )
    assert first_sentence("no stop") == "no stop"
    assert first_sentence(None) == ""
