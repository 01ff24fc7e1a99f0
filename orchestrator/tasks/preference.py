"""Preference tuning: of two answers to a prompt, the chosen one becomes likelier than the rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from orchestrator.effects import Affects, Effect
from orchestrator.tasks.answer_pairs import SIDES, AnswerPairs, ids_of_both, measured
from orchestrator.tasks.base import IGNORED, RawRow
from orchestrator.tasks.batches import pad
from orchestrator.tasks.default_lr import DPO_ADAPTED, Rate
from orchestrator.tasks.generation import complete
from orchestrator.tasks.packing import model_inputs, row_inputs
from orchestrator.tasks.preference_losses import DPO, Likelihoods, PreferenceLossSpec

if TYPE_CHECKING:
    import numpy as np
    import torch


class PreferenceTuning(AnswerPairs):
    """A language model learns which of two answers is preferred, by DPO, IPO, SimPO or ORPO.

    Where the loss needs a reference, it is the model before training; its likelihoods are computed once.
    """

    type: Literal["preference"]
    loss: Annotated[PreferenceLossSpec, Affects(Effect.TRAINING)] = DPO()
    """The loss, with its settings."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    peft_task: ClassVar[str] = "CAUSAL_LM"
    all_logits: ClassVar[bool] = True
    writes_on: ClassVar[bool] = True
    reads_left_to_right: ClassVar[bool] = True
    default_global_batch_size: ClassVar[int] = 16
    default_global_batch_size_source: ClassVar[str] = (
        "a start and no more: Rafailov et al., arXiv 2305.18290, B, used 64 pairs"
    )
    adapter_lr: ClassVar[Rate | None] = DPO_ADAPTED

    @property
    def has_reference(self) -> bool:
        return self.loss.needs_reference

    def default_tuned_lr(self, model_type: str) -> Rate:
        return self.loss.tuned_lr

    @property
    def sections(self) -> Mapping[str, Any]:
        return {"loss": self.loss}

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.prompt_column,)

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        """All chosen answers above all rejected ones: (2 × rows, longest)."""
        import numpy as np
        import torch

        ids = ids_of_both(rows)
        targets = [row[f"{side}_targets"] for side in SIDES for row in rows]
        labels = [np.where(t > 0, one, IGNORED) for one, t in zip(ids, targets, strict=True)]
        reference = [[float(row.get(f"reference_{side}", 0)) for row in rows] for side in SIDES]
        return {
            **row_inputs([{"input_ids": one} for one in ids], pad_id, packing=False),
            "labels": pad(labels, IGNORED),
            "reference": torch.tensor(reference),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.loss.losses(likelihoods(model, batch)) * batch["weights"]).sum()

    def reference(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        totals = likelihoods(model, batch).total.double().cpu().numpy()
        return {f"reference_{side}": totals[i] for i, side in enumerate(SIDES)}

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        answers = likelihoods(model, batch)
        return measured(self.loss.rewards(answers), self.loss.losses(answers))

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        asked = [(row[self.prompt_column], row.get(self.tools_column)) for row in rows]
        return [
            {"prompt": prompt, "completion": complete(model, tokenizer, prompt, True, tools)}
            for prompt, tools in asked
        ]


def likelihoods(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Likelihoods:
    """Return the log-likelihoods of a batch's answers, in fp32."""
    logits = model(**model_inputs(model, batch), use_cache=False).logits
    labels = batch["labels"][:, 1:]
    of_tokens = logits[:, :-1].float().log_softmax(-1)
    of_labels = of_tokens.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    learned = labels != IGNORED
    total: torch.Tensor = (of_labels * learned).sum(-1)
    return Likelihoods(total.view(2, -1), learned.sum(-1).view(2, -1), batch["reference"])
