"""Training in a plan, as shown on the screen: learning rates, schedule, regularization, settings, defaults."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from orchestrator.plan.chart import text_chart
from orchestrator.plan.plan import Plan
from orchestrator.plan.unfreezing import all_move_at_step, interval_steps, moving_layers

Row = tuple[str, str, str]


def learning(plan: Plan) -> Iterator[Row]:
    """Rows of (what, value, reason)."""
    yield from _rates(plan)
    yield from _regularization(plan)
    yield from _distillation(plan)


def _rates(plan: Plan) -> Iterator[Row]:
    spec, reasons = plan.spec, plan.reasons
    optimizer = spec.optimizer
    yield (
        "optimizer",
        f"{optimizer.type}, lr {plan.learning_rate:g}, weight decay {optimizer.weight_decay:g}",
        f"{plan.optimizer_class}: {reasons.get('optimizer_class', 'optimizer.implementation')}",
    )
    if plan.part_rates:
        yield (
            "rates by part",
            ", ".join(f"{lr:.2g} for {count:,}" for lr, count in plan.part_rates),
            "peak rate for so many parameters: optimizer.layer_decay, optimizer.head_lr",
        )
    yield from _unfreezing(plan)
    rates = [lr for _, lr in plan.planned_rates]
    yield (
        "schedule",
        f"{spec.schedule.type}, {plan.warmup_steps} warm-up steps",
        f"lr {max(rates):.2g} → {rates[-1]:.2g} at the last step",
    )
    if note := spec.schedule.describe(plan.metric):
        yield "", "", note


def _unfreezing(plan: Plan) -> Iterator[Row]:
    every = interval_steps(plan)
    if every is None:
        return
    first, last = moving_layers(plan, 0), all_move_at_step(plan)
    begin = f"the head and the last {first}" if first else "the head"
    until = f"all move from step {last:,}"
    if last > plan.total_steps:
        until = f"all would move from step {last:,}, after the last one"
    why = f"{until}; gradients and optimizer state of all are held from the first step"
    yield "unfreezing", f"{begin}, one layer more every {every:,} steps", why


def schedule_chart(plan: Plan) -> Text:
    """The learning rate over the run."""
    schedule, total = plan.spec.schedule, plan.total_steps
    peak = f"{plan.learning_rate:.2g}"
    lines = text_chart(lambda step: schedule.lr_factor(step, total), total, peak)
    return Text("\n".join(["learning rate by step", *lines]), style="dim", no_wrap=True)


def _regularization(plan: Plan) -> Iterator[Row]:
    settings, reasons = plan.spec.regularization, plan.reasons
    if settings.r_drop_alpha is not None:
        why = "every row stands twice in its micro-batch: activations and time double"
        yield "r-drop alpha", f"{settings.r_drop_alpha:g}", why
    if settings.token_dropout:
        share = f"{settings.token_dropout:.0%} of the words"
        yield "token dropout", share, reasons["mask_token_id"]
    if plan.class_weights:
        pairs = zip(plan.labels, plan.class_weights, strict=True)
        shown = ", ".join(f"{label} {weight:.3g}" for label, weight in pairs)
        yield "class weights", shown, reasons.get("class_weights", "regularization.class_weights")
    averaging = settings.averaging
    if averaging.keeps_average:
        why = (
            "evaluated and exported in place of the weights; one more fp32 value per trained weight"
        )
        what = averaging.describe(plan.total_steps, plan.steps_per_epoch)
        yield "average of the weights", what, why


def _distillation(plan: Plan) -> Iterator[Row]:
    settings, data = plan.spec.distillation, plan.train_data
    if settings is None:
        return
    size = f"{data.teacher_bytes / 2**20:,.1f} MiB of outputs"
    yield "teacher", settings.teacher, f"{size}, asked once: {data.teacher_folder}"
    loss = f"{1 - settings.alpha:g} × own + {settings.alpha:g} × {settings.temperature:g}² × divergence"
    yield "loss", loss, "distillation.alpha, distillation.temperature"
    if settings.hidden is not None:
        pairs = ", ".join(f"{mine} from {theirs}" for mine, theirs in plan.model.hidden_pairs)
        why = f"weight {settings.hidden.weight:g}; {plan.model.projection:,} parameters of projections beside the model"
        yield "hidden states", f"layers {pairs}", why


def setting_rows(plan: Plan) -> Iterator[Row]:
    """Return the rows for the fields that the job sets."""
    for one in plan.settings:
        yield one.field, one.value, one.why


def default_rows(plan: Plan) -> Iterator[Row]:
    """Values that the job leaves open."""
    for one in plan.defaults:
        yield one.field, one.value, f"default, because: {one.why}"
