"""A pod template with a user's fields laid over it.

See docs/decisions/0032-pod-fields-are-overridden-by-a-strategic-merge.md.
"""

from __future__ import annotations

from typing import Any

KEYS = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name",
    "volumeMounts": "mountPath", "ports": "containerPort", "imagePullSecrets": "name",
    "hostAliases": "ip", "topologySpreadConstraints": "topologyKey",
}  # fmt: skip
"""Lists that Kubernetes' strategic merge patch merges by a key, as in its API."""


def merged(base: Any, patch: Any, name: str = "") -> Any:
    """`base` with `patch` over it, neither changed: mappings by key, known lists by their entries' key,
    anything else replaced. A null in a mapping removes the field."""
    if isinstance(base, dict) and isinstance(patch, dict):
        out = {k: v for k, v in base.items() if k not in patch}
        laid = {k: merged(base.get(k), v, k) for k, v in patch.items() if v is not None}
        order = [k for k in base if k in laid or k in out] + [k for k in laid if k not in base]
        return {k: laid[k] if k in laid else out[k] for k in order}
    if isinstance(patch, dict):
        return merged({}, patch, name)
    key = KEYS.get(name)
    if isinstance(base, list) and isinstance(patch, list) and key and _keyed(base + patch, key):
        laid_by = {entry[key]: entry for entry in patch}
        known = {entry[key] for entry in base}
        return [merged(entry, laid_by.get(entry[key], {})) for entry in base] + [
            entry for entry in patch if entry[key] not in known
        ]
    return patch


def _keyed(entries: list[Any], key: str) -> bool:
    return all(isinstance(entry, dict) and key in entry for entry in entries)
