"""Shared by all tests: tiny models, and one Ray of our own per test session."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from orchestrator.launch.session import ray_session

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Ray workers import the helpers that stand beside the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)


def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw is the same whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
