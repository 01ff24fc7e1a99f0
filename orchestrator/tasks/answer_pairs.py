"""Base of tasks on pairs of answers: a chosen and a rejected one to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.tasks.base import BadRow, EncodedRow, FeatureKind, RawRow, Task
from orchestrator.tasks.default_lr import BY_SIZE, LM_NEW
from orchestrator.tasks.pairs import encode_pair

if TYPE_CHECKING:
    import numpy as np
    import torch

SIDES = ("chosen", "rejected")


class AnswerPairs(Task):
    """Two answers to one prompt. In batches, all chosen answers stand above all rejected ones."""

    prompt_column: str = "prompt"
    """Column with the prompt, a text or a list of messages. Files may lack it: the prompt is then what
    both answers begin with."""
    chosen_column: str = "chosen"
    """Column with the better answer: a text, or a list of messages with or without the prompt's."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    tools_column: str = "tools"
    """Column with the tools on offer: a list of JSON schemas, or its JSON text. Rows may lack it."""

    metric_names: ClassVar[tuple[str, ...]] = (
        "reward_accuracy",
        "reward_margin",
        "reward_chosen",
        "reward_rejected",
        "loss",
    )
    default_metric: ClassVar[str] = "reward_accuracy"
    no_soft_targets: ClassVar[str] = "it compares two whole answers"
    token_features: ClassVar[tuple[str, ...]] = tuple(f"{side}_ids" for side in SIDES)
    new_lrs: ClassVar[BY_SIZE] = LM_NEW
    prompt_required: ClassVar[bool] = True
    """Answers without a prompt column must begin alike."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.chosen_column, self.rejected_column)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return (self.prompt_column, self.tools_column)

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
            [row.get(c) for c in columns],
            columns,
            tokenizer,
            row.get(self.tools_column),
            self.prompt_required,
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

    def metrics(self, gathered: dict[str, np.ndarray], labels: tuple[str, ...]) -> dict[str, Any]:
        """Return means over all pairs.

        `reward_accuracy` is the share of pairs whose chosen answer has the higher reward; ties are wrong.
        """
        margin = gathered["chosen"] - gathered["rejected"]
        return {
            "loss": float(gathered["loss"].mean()),
            "reward_accuracy": float((margin > 0).mean()),
            "reward_margin": float(margin.mean()),
            "reward_chosen": float(gathered["chosen"].mean()),
            "reward_rejected": float(gathered["rejected"].mean()),
        }


def ids_of_both(rows: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Return the token ids of all chosen answers, then of all rejected ones."""
    return [row[f"{side}_ids"] for side in SIDES for row in rows]


def measured(rewards: torch.Tensor, losses: torch.Tensor) -> dict[str, np.ndarray]:
    """Return what `AnswerPairs.metrics` needs, of rewards (2, rows) and losses (rows,), in fp64."""
    chosen, rejected = rewards.double().cpu().numpy()
    return {"loss": losses.double().cpu().numpy(), "chosen": chosen, "rejected": rejected}
