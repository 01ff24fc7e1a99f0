"""Names that Kubernetes accepts, and YAML that every reader reads alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import yaml

MAX_RAYJOB_NAME = 47
"""The operator's limit: it appends to the name, and labels end at 63 characters."""
MAX_RAYCLUSTER_NAME = 53
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9 ._/:@=-]*")
ODD = re.compile(r"[^\n\x20-\x7e\xa1-\u1fff\u2030-\ud7ff\U00010000-\U0010ffff]")
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


def object_name(run: str, limit: int) -> str:
    """A DNS-1035 label for a run's name: itself where it is one, else its letters and a hash of it.

    The hash keeps `a.b` and `a_b` apart.
    """
    if len(run) <= limit and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run):
        return run
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    letters = re.sub(r"[^a-z0-9-]", "-", run.lower()).lstrip("-0123456789") or "run"
    return f"{letters[: limit - 9].rstrip('-') or 'run'}-{digest}"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML reader takes for a number, a truth value or nothing.

    PyYAML knows YAML 1.1 as it reads it; Go's readers also take `1e3`, `0o7` or `y` for something else.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=_style(value))


def _style(value: str) -> str | None:
    """Plain where nobody can misread it; escaped where readers differ on what ends a line."""
    if ODD.search(value):
        return '"'
    if "\n" in value:
        return "|"
    plain = PLAIN.fullmatch(value) and value.lower() not in WORDS and ": " not in value
    return None if plain and not value.endswith((":", " ")) else "'"


_Dumper.add_representer(str, _text)


def dump_documents(documents: Iterable[dict[str, Any]]) -> str:
    """YAML documents, one after the other, keys in the order given."""
    return yaml.dump_all(
        list(documents), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16
    )
