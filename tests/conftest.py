"""Shared by all tests: tiny models, and one Ray of our own per test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from orchestrator.launch.session import ray_session

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Ray workers import the helpers that stand beside the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """Tiny models and tokenizers on disk."""
    return tiny.build(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """A Ray with room for two training workers; the same one for the whole test session."""
    os.environ.pop("RAY_ADDRESS", None)
    with ray_session(cpus=2) as module:
        yield module
