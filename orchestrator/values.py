"""What all values share: frozen, closed to unknown keys, unions told apart by `type`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "mae", "wer", "cer"})
"""Metrics to be made small; all others are to be made large."""


class Frozen(BaseModel):
    """A value: never changes after it was read, refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def by_type(default: str) -> Discriminator:
    """Choose a union's member by its `type`; without one it is `default`.

    So `optimizer.lr=3e-5` works on a job that has no `optimizer:` section.
    """

    def tag(value: Any) -> str | None:
        if isinstance(value, dict):
            return value.get("type", default)
        return getattr(value, "type", None)

    return Discriminator(tag)
