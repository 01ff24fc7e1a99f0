"""What all typed manifests share: Python names here, Kubernetes' names in what is written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Manifest(BaseModel):
    """A part of a manifest: frozen, closed to unknown fields, strict about types as the API server is."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=True
    )

    def dump(self) -> dict[str, Any]:
        """As Kubernetes spells it; fields that were not given are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)


class ObjectMeta(Manifest):
    """An object's `metadata`: what we write and rules read; Kubernetes knows more."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    generate_name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Object(Manifest):
    """A whole object: kind and API version are always written."""

    api_version: str
    kind: str
    metadata: ObjectMeta

    def dump(self) -> dict[str, Any]:
        """As Kubernetes spells it."""
        return {"apiVersion": self.api_version, "kind": self.kind, **super().dump()}
