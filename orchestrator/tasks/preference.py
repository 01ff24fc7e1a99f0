"""Preference tuning: of two answers to a prompt, the chosen one becomes likelier than the rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.tasks.base import (
    IGNORED,
    BadRow,
    EncodedRow,
    FeatureKind,
    RawRow,
    Task,
    pad,
)
from orchestrator.tasks.generation import complete
from orchestrator.tasks.packing import model_inputs, row_inputs
from orchestrator.tasks.pairs import encode_pair
from orchestrator.tasks.usual import BY_SIZE, DPO_ADAPTED, DPO_TUNED, LM_NEW, Rate

if TYPE_CHECKING:
    import numpy as np
    import torch

SIDES = ("chosen", "rejected")


class PreferenceTuning(Task):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7).

    The reference is the model before training; what it says of each answer is computed once.
    """

    type: Literal["preference"]
    prompt_column: str = "prompt"
    """Column with the prompt, a text or a list of messages. Files may lack it: the prompt is then what
    both answers begin with."""
    chosen_column: str = "chosen"
    """Column with the better answer: a text, or a list of messages with or without the prompt's."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    tools_column: str = "tools"
    """Column with the tools on offer: a list of JSON schemas, or its JSON text. Rows may lack it."""
    beta: Annotated[float, Field(gt=0), Affects(Effect.TRAINING)] = 0.1
    """How strongly the model is held to the reference; rewards are beta × the log of their ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Affects(Effect.TRAINING)] = 0.0
    """Share of pairs taken to be the wrong way round (conservative DPO, Mitchell 2023)."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "reward_accuracy",
        "reward_margin",
        "reward_chosen",
        "reward_rejected",
        "loss",
    )
    default_metric: ClassVar[str] = "reward_accuracy"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    peft_task: ClassVar[str] = "CAUSAL_LM"
    no_soft_targets: ClassVar[str] = "it compares two whole answers"
    all_logits: ClassVar[bool] = True
    writes_on: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True
    reads_left_to_right: ClassVar[bool] = True
    usual_global_rows: ClassVar[int] = 16
    usual_global_rows_source: ClassVar[str] = (
        "a start and no more: Rafailov et al., arXiv 2305.18290, B, used 64 pairs"
    )
    tuned_rates: ClassVar[Mapping[str, Rate]] = DPO_TUNED
    adapted_rate: ClassVar[Rate | None] = DPO_ADAPTED
    new_rates: ClassVar[BY_SIZE] = LM_NEW
    sources: ClassVar[Mapping[str, str]] = {
        "beta": "Rafailov et al., arXiv 2305.18290, B",
        "label_smoothing": "none: plain DPO, Rafailov et al., arXiv 2305.18290, eq. 7",
    }

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.chosen_column, self.rejected_column)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return (self.prompt_column, self.tools_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.prompt_column,)

    token_features: ClassVar[tuple[str, ...]] = tuple(f"{side}_ids" for side in SIDES)

    def features(self) -> dict[str, FeatureKind]:
        return {f"{side}_{part}": "ints" for side in SIDES for part in ("ids", "targets")}

    def length(self, row: EncodedRow) -> int:
        return sum(len(row[f"{side}_ids"]) for side in SIDES)

    def padded_length(self, row: EncodedRow) -> int:
        return 2 * max(len(row[f"{side}_ids"]) for side in SIDES)

    def encode(
        self, rows: Sequence[RawRow], tokenizer: Any, max_length: int, labels: tuple[str, ...]
    ) -> list[EncodedRow | BadRow]:
        return [self._encoded(row, tokenizer, max_length) for row in rows]

    def _encoded(self, row: RawRow, tokenizer: Any, max_length: int) -> EncodedRow | BadRow:
        columns = (self.prompt_column, self.chosen_column, self.rejected_column)
        sides = encode_pair(
            [row.get(c) for c in columns], columns, tokenizer, row.get(self.tools_column)
        )
        if isinstance(sides, BadRow):
            return sides
        notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
        out: EncodedRow = {"n_targets": 1, "truncated": 0, "notes": notes}
        for side, column, encoded in zip(SIDES, columns[1:], sides, strict=True):
            ids, targets = encoded.ids, encoded.targets
            if not any(targets[1:max_length]):
                return BadRow(f"nothing of column {column!r} is within {max_length} tokens")
            out[f"{side}_ids"], out[f"{side}_targets"] = ids[:max_length], targets[:max_length]
            out["truncated"] |= int(len(ids) > max_length)
        if out["chosen_ids"] == out["rejected_ids"]:
            return BadRow(f"both answers are the same within {max_length} tokens")
        return out

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        """All chosen answers above all rejected ones: (2 × rows, longest)."""
        import numpy as np
        import torch

        ids, labels = [], []
        for side in SIDES:
            for row in rows:
                ids.append(row[f"{side}_ids"])
                labels.append(np.where(row[f"{side}_targets"] > 0, ids[-1], IGNORED))
        reference = [[float(row.get(f"reference_{side}", 0)) for row in rows] for side in SIDES]
        return {
            **row_inputs([{"input_ids": one} for one in ids], pad_id, packing=False),
            "labels": pad(labels, IGNORED),
            "reference": torch.tensor(reference),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self._losses(self._rewards(model, batch)) * batch["weights"]).sum()

    def _rewards(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(2, rows): of chosen and of rejected answers."""
        return self.beta * (_log_likelihoods(model, batch) - batch["reference"])

    def _losses(self, rewards: torch.Tensor) -> torch.Tensor:
        """Loss of each pair (rows,)."""
        import torch.nn.functional as functional

        margin, wrong = rewards[0] - rewards[1], self.label_smoothing
        return -(1 - wrong) * functional.logsigmoid(margin) - wrong * functional.logsigmoid(-margin)

    def reference(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        found = _log_likelihoods(model, batch).double().cpu().numpy()
        return {f"reference_{side}": found[i] for i, side in enumerate(SIDES)}

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        rewards = self._rewards(model, batch)
        chosen, rejected = rewards.double().cpu().numpy()
        losses = self._losses(rewards).double().cpu().numpy()
        return {"loss": losses, "chosen": chosen, "rejected": rejected}

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """`reward_accuracy`: share of pairs whose chosen answer has the higher reward; ties are wrong."""
        margin = gathered["chosen"] - gathered["rejected"]
        return {
            "loss": float(gathered["loss"].mean()),
            "reward_accuracy": float((margin > 0).mean()),
            "reward_margin": float(margin.mean()),
            "reward_chosen": float(gathered["chosen"].mean()),
            "reward_rejected": float(gathered["rejected"].mean()),
        }

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        asked = [(row[self.prompt_column], row.get(self.tools_column)) for row in rows]
        return [
            {"prompt": prompt, "completion": complete(model, tokenizer, prompt, True, tools)}
            for prompt, tools in asked
        ]


def _log_likelihoods(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each answer, summed over its tokens, in fp32: (2, rows)."""
    logits = model(**model_inputs(model, batch), use_cache=False).logits
    labels = batch["labels"][:, 1:]
    of_tokens = logits[:, :-1].float().log_softmax(-1)
    chosen = of_tokens.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums: torch.Tensor = (chosen * (labels != IGNORED)).sum(-1)
    return sums.view(2, -1)
