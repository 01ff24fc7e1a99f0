"""Base of all values: frozen, closed to unknown keys, unions told apart by `type`."""

import types
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


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


def model_members(annotation: Any) -> list[type[BaseModel]]:
    """Return the models inside an annotation: itself, or the members of its unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return [m for a in typing.get_args(annotation) for m in model_members(a)]
    return []
