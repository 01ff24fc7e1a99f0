"""Checkpoints hold values: code in them is never run, whoever wrote them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from orchestrator.errors import CheckpointError
from orchestrator.train import engine
from orchestrator.train.averaging import AVERAGED_FILE
from orchestrator.train.checkpoint import Committed
from orchestrator.train.engine import TAG
from orchestrator.train.export import checkpoint_state
from orchestrator.train.reshard import read_weights
from orchestrator.train.tensors import load_tensors


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def write_attack(path: Path, mark: Path, inside: str) -> None:
    """Write a file of tensors with code in one of the places where a class is allowed."""
    scaler = LossScaler(1.0)
    scaler.extra = Attack(mark)  # type: ignore[attr-defined]
    places: dict[str, Any] = {
        "value": Attack(mark),
        "list": [torch.zeros(1), Attack(mark)],
        "array": np.array([Attack(mark)], dtype=object),
        "scaler": scaler,
        "address": fragment_address(Attack(mark), 0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": places[inside]}, path)


@pytest.mark.parametrize("inside", ["value", "list", "array", "scaler", "address"])
def test_code_in_a_file_of_tensors_is_refused_and_not_run(
    inside: str, tmp_path: Path, mark: Path
) -> None:
    write_attack(tmp_path / "a.pt", mark, inside)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_tensors(tmp_path / "a.pt")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists(), "the attack is a real one"


@pytest.mark.parametrize(("stage", "averaged"), [(0, True), (0, False), (1, False), (3, False)])
def test_weights_of_a_foreign_run_are_read_without_running_its_code(
    stage: int, averaged: bool, tmp_path: Path, mark: Path
) -> None:
    for name in (
        *([AVERAGED_FILE] if averaged else []),
        f"{TAG}/mp_rank_00_model_states.pt",
        f"{TAG}/zero_pp_rank_0_mp_rank_00_model_states.pt",
        f"{TAG}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ):
        write_attack(tmp_path / name, mark, "value")
    with pytest.raises(CheckpointError):
        checkpoint_state(Committed(tmp_path, {"step": 1, "stage": stage, "world_size": 1}))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path, stage or 1, 1)
    assert not mark.exists()


def test_random_state_is_read_without_running_code(tmp_path: Path, mark: Path) -> None:
    write_attack(tmp_path / "random-00000.pt", mark, "value")
    with pytest.raises(CheckpointError):
        engine.load_random_state(tmp_path, 0, 1, 1)
    assert not mark.exists()


def test_random_state_is_restored_to_the_bit(tmp_path: Path) -> None:
    engine.seed_everything(3, 0)
    np.random.standard_normal()  # leaves a second value in NumPy's state
    torch.save(engine._random_state(), tmp_path / "random-00000.pt")

    def drawn() -> tuple[Any, ...]:
        return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    wanted = drawn()
    engine.seed_everything(4, 0)
    engine.load_random_state(tmp_path, 0, 1, 1)
    assert drawn() == wanted


def test_what_deepspeed_stores_beside_tensors_is_read(tmp_path: Path) -> None:
    stored = {"a": LossScaler(2.0), "b": ZeroStageEnum(2), "c": fragment_address(3, 4)}
    torch.save(stored, tmp_path / "a.pt")
    found = load_tensors(tmp_path / "a.pt", mmap=True)
    assert (found["a"].cur_scale, found["b"], found["c"]) == (2.0, 2, fragment_address(3, 4))


@pytest.mark.parametrize("content", [b"", b"text", bytes(100)])
def test_a_file_that_is_none_of_tensors_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_tensors(tmp_path / "a.pt")
