"""Reward models: a number for each answer, learned from which of two answers is preferred."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.effects import Affects, Effect
from orchestrator.errors import DataError
from orchestrator.tasks.answer_pairs import SIDES, AnswerPairs, ids_of_both, measured
from orchestrator.tasks.base import BadRow, EncodedRow, FeatureKind, RawRow, text_problem
from orchestrator.tasks.batches import tokens_and_mask
from orchestrator.tasks.default_lr import Rate
from orchestrator.tasks.labels import shown
from orchestrator.tasks.messages import is_messages
from orchestrator.tasks.pairs import encode_answer
from orchestrator.tasks.sequence import outputs_of
from orchestrator.tasks.tokenizing import ends_with

if TYPE_CHECKING:
    import numpy as np
    import torch


class RewardModel(AnswerPairs):
    """A model with one output scores answers; a pair's chosen answer should score higher (Bradley-Terry).

    The loss is that of Ouyang et al., arXiv 2203.02155, eq. 1, for one pair of each prompt.
    """

    type: Literal["reward_model"]
    answer_column: Annotated[str, Affects(Effect.PREDICTION)] = "completion"
    """Column with the answer to score in predictions: a text, or a list of messages."""
    margin_column: str = "margin"
    """Column with the difference of the two rewards that is asked for (Touvron et al., arXiv 2307.09288,
    eq. 2). Files may lack it: the margin is then 0."""
    center_coefficient: Annotated[float, Field(ge=0), Affects(Effect.TRAINING)] = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around 0 (Eisenstein et al.,
    arXiv 2312.09244)."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    peft_task: ClassVar[str] = "SEQ_CLS"
    labeled_head: ClassVar[bool] = True
    pools: ClassVar[bool] = True
    prompt_required: ClassVar[bool] = False
    default_global_batch_size: ClassVar[int] = 64
    default_global_batch_size_source: ClassVar[str] = "Ouyang et al., arXiv 2203.02155, C.2"
    tuned_lrs: ClassVar[Mapping[str, Rate]] = {
        "": Rate(
            1e-5, "Touvron et al., arXiv 2307.09288, 3.2.2, for all but the largest reward model"
        )
    }
    sources: ClassVar[Mapping[str, str]] = {
        "center_coefficient": "none; Eisenstein et al., arXiv 2312.09244, used 0.01"
    }

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return (*super().optional_columns, self.margin_column)

    @property
    def predict_columns(self) -> tuple[str, ...]:
        return (self.prompt_column, self.answer_column)

    def adapt_tokenizer(self, tokenizer: Any, config: Any) -> None:
        if config.is_encoder_decoder:
            ends_with(tokenizer, config.eos_token_id)

    def features(self) -> dict[str, FeatureKind]:
        return {**{f"{side}_ids": "ints" for side in SIDES}, "margin": "float"}

    def _encoded(self, row: RawRow, tokenizer: Any, max_length: int) -> EncodedRow | BadRow:
        margin = _number(row.get(self.margin_column))
        if margin is None:
            value = shown(row[self.margin_column])
            return BadRow(f"column {self.margin_column!r} must be a number from 0, got {value}")
        encoded = super()._encoded(row, tokenizer, max_length)
        if isinstance(encoded, BadRow):
            return encoded
        learned = {f"{side}_targets" for side in SIDES}
        kept = {name: value for name, value in encoded.items() if name not in learned}
        return {**kept, "margin": margin}

    def config_overrides(self, labels: tuple[str, ...]) -> dict[str, Any]:
        names = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
        return {"num_labels": 1, **names, "problem_type": "regression"}

    def collate(
        self, rows: Sequence[dict[str, np.ndarray]], weights: np.ndarray, pad_id: int
    ) -> dict[str, torch.Tensor]:
        """All chosen answers above all rejected ones: (2 × rows, longest)."""
        import numpy as np
        import torch

        return {
            **tokens_and_mask(ids_of_both(rows), pad_id),
            "margin": torch.tensor([float(row["margin"]) for row in rows]),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self._losses(_rewards(model, batch), batch["margin"]) * batch["weights"]).sum()

    def _losses(self, rewards: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        """Return the loss of each pair (rows,), of rewards (2, rows) and margins (rows,)."""
        import torch.nn.functional as functional

        losses = -functional.logsigmoid(rewards[0] - rewards[1] - margin)
        return losses + self.center_coefficient * rewards.sum(0) ** 2

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        rewards = _rewards(model, batch)
        return measured(rewards, self._losses(rewards, batch["margin"]))

    def prediction_problem(self, row: RawRow) -> str | None:
        columns = [self.answer_column]
        if row[self.prompt_column] is not None:
            columns.append(self.prompt_column)
        whys = (text_problem(row[c], c) for c in columns if not is_messages(row[c]))
        return next((why for why in whys if why), None)

    def predict(
        self, model: Any, tokenizer: Any, rows: Sequence[RawRow], max_length: int
    ) -> list[dict[str, Any]]:
        import numpy as np
        import torch

        ids = []
        for row in rows:
            columns = (self.prompt_column, self.answer_column)
            prompt, answer = (row[column] for column in columns)
            tools = row.get(self.tools_column)
            encoded = encode_answer(prompt, answer, columns, tokenizer, tools)
            if isinstance(encoded, BadRow):
                raise DataError(f"{row!r:.200}: {encoded.why}")
            ids.append(np.asarray(encoded.ids[:max_length]))
        pad_id = tokenizer.pad_token_id
        inputs = tokens_and_mask(ids, 0 if pad_id is None else pad_id)
        with torch.no_grad():
            rewards = outputs_of(model, {k: v.to(model.device) for k, v in inputs.items()})
        return [
            {
                "prompt": row[self.prompt_column],
                "completion": row[self.answer_column],
                "reward": reward,
            }
            for row, reward in zip(rows, (round(float(r[0]), 6) for r in rewards), strict=True)
        ]


def _rewards(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the rewards of a batch's answers (2, rows), in fp32."""
    return outputs_of(model, batch).view(2, -1)


def _number(value: Any) -> float | None:
    """Return a margin, 0 where there is none; None for what is not a number from 0."""
    if value is None:
        return 0.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
