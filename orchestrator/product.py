"""The product's name on package indexes and its version, each in one place."""

from __future__ import annotations

DISTRIBUTION = "ray-finetune-orchestrator"
"""The package to install. The import package is `orchestrator`, which on PyPI is the name of another project."""
VERSION = "0.1.0"


def install_hint(extra: str) -> str:
    """Return the command that installs the packages of one of this product's extras."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
