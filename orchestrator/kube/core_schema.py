"""Kubernetes' own schemas, from the package `kubernetes-validate` where it is installed."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from orchestrator.product import install_hint

KUBERNETES_VERSION = "1.34"
"""Whose schemas are taken."""
POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
HOW_TO_GET = f"{install_hint('kubernetes')} installs Kubernetes' schemas"


@lru_cache(maxsize=1)
def definitions() -> dict[str, Any] | None:
    """All of Kubernetes' types by name; None where the package is missing."""
    try:
        package = files("kubernetes_validate")
    except ModuleNotFoundError:
        return None
    folder = package / "kubernetes-json-schema" / f"v{KUBERNETES_VERSION}.0-local-strict"
    read = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = read["$defs"]
    return found


def schema_named(name: str) -> dict[str, Any] | None:
    """JSON Schema of one type."""
    known = definitions()
    return {"$ref": f"#/$defs/{name}", "$defs": known} if known and name in known else None


def schema_of_kind(api_version: str, kind: str) -> dict[str, Any] | None:
    """JSON Schema of a kind; None where the kind is none of Kubernetes' own, or the package is missing."""
    name = _names().get((api_version, kind))
    return schema_named(name) if name else None


@lru_cache(maxsize=1)
def _names() -> dict[tuple[str, str], str]:
    out = {}
    for name, schema in (definitions() or {}).items():
        for one in schema.get("x-kubernetes-group-version-kind", ()):
            group = f"{one['group']}/" if one["group"] else ""
            out[(f"{group}{one['version']}", one["kind"])] = name
    return out
