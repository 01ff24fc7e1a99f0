"""Make names that Kubernetes accepts, and YAML that every parser reads alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import yaml

MAX_RAYJOB_NAME, MAX_RAYCLUSTER_NAME = 47, 53
"""The operator's limits: it appends to names, and labels have at most 63 characters."""
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9 ._/:@=-]*")
SPECIAL = re.compile(r"[^\n\x20-\x7e\xa1-\u1fff\u2030-\ud7ff\U00010000-\U0010ffff]")
RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


def object_name(run: str, limit: int) -> str:
    """Return a DNS-1035 label for a run's name: the name itself if it is one, else its letters and a hash.

    The hash distinguishes `a.b` from `a_b`.
    """
    if len(run) <= limit and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run):
        return run
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    letters = re.sub(r"[^a-z0-9-]", "-", run.lower()).lstrip("-0123456789") or "run"
    return f"{letters[: limit - 9].rstrip('-') or 'run'}-{digest}"


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every text that some YAML parser takes for a number, a boolean or null.

    PyYAML quotes for its own YAML 1.1. Go's parsers also take `1e3`, `0o7` or `y` for something else.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=_style(value))


def _style(value: str) -> str | None:
    """Return the style: plain if unambiguous, escaped if parsers disagree on line ends, else quoted."""
    if SPECIAL.search(value):
        return '"'
    if "\n" in value:
        return "|"
    plain = PLAIN.fullmatch(value) and value.lower() not in RESERVED and ": " not in value
    return None if plain and not value.endswith((":", " ")) else "'"


_Dumper.add_representer(str, _text)


def dump_documents(documents: Iterable[dict[str, Any]]) -> str:
    """Return YAML documents with their keys in the order given."""
    return yaml.dump_all(
        list(documents), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16
    )
