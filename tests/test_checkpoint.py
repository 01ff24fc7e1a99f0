"""A checkpoint counts only with its commit marker and its checksums."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import faults
import pytest

from orchestrator.errors import CheckpointError
from orchestrator.run_folder import RunFolder
from orchestrator.train.checkpoint import (
    COMMIT,
    SHARED_MEMORY,
    CheckpointWriter,
    committed,
    damage,
    newest_valid,
    put_aside_newer,
    remove_uncommitted,
)


def save(folder: Path, step: int, writers: list[CheckpointWriter], size: int = 1000) -> None:
    def one(writer: CheckpointWriter) -> None:
        writer.save(
            step,
            lambda staging: (
                (staging / f"part-{writer.rank}.pt").write_bytes(b"x" * size + bytes([step]))
                and None
            ),
            {"stage": 2},
        )
        writer.wait()

    threads = [threading.Thread(target=one, args=(w,)) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def writers(folder: RunFolder) -> list[CheckpointWriter]:
    return [CheckpointWriter(folder.checkpoints, rank, 2, 2, "abc123") for rank in range(2)]


def test_a_checkpoint_of_all_ranks_is_committed_and_valid(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    (found,) = committed(folder.checkpoints)
    assert (found.step, damage(found)) == (10, None)
    assert {p.name for p in found.folder.glob("*.pt")} == {"part-0.pt", "part-1.pt"}


def test_what_is_small_is_staged_in_memory_and_what_a_killed_rank_left_there_is_deleted(
    folder: RunFolder,
) -> None:
    def writer(size_bytes: int) -> CheckpointWriter:
        return CheckpointWriter(folder.checkpoints, 0, 1, 2, "abc123", size_bytes=size_bytes)

    seen: list[Path] = []

    def note(staging: Path) -> None:
        (staging / "a.pt").write_bytes(b"1")
        seen.append(staging)

    for size_bytes in (1000, 2**50):
        one = writer(size_bytes)
        one.save(10, note, {})
        one.wait()
    assert [staging.is_relative_to(SHARED_MEMORY) for staging in seen] == [True, False]
    assert not any(staging.exists() for staging in seen)
    note(writer(1000)._staging())  # and is killed
    writer(1000)
    assert not seen[-1].exists()


def test_without_all_ranks_there_is_no_commit(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    writers[1].save(10, lambda staging: (staging / "a.pt").write_bytes(b"1") and None, {})
    writers[1].wait()
    assert committed(folder.checkpoints) == []
    remove_uncommitted(folder.checkpoints)
    assert list(folder.checkpoints.iterdir()) == []


@pytest.mark.parametrize("how", [faults.flip_bit, faults.truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    how: object, folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    save(folder.checkpoints, 20, writers)
    assert callable(how)
    broken = faults.damage_newest(folder, how)
    warnings: list[str] = []
    found = newest_valid(folder.checkpoints, warnings.append)
    assert found is not None
    assert found.step == 10
    assert broken.name in warnings[0]


@pytest.mark.parametrize("text", ["", '{"step": 2', "[]", '{"other": 1}'])
def test_a_torn_commit_marker_is_no_commit(
    text: str, folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    save(folder.checkpoints, 20, writers)
    newest = committed(folder.checkpoints)[0]
    (newest.folder / COMMIT).write_text(text)
    found = newest_valid(folder.checkpoints, lambda _: None)
    assert found is not None
    assert found.step == 10


def test_the_newest_and_the_best_are_kept(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    for step in (10, 20, 30, 40, 50):
        for writer in writers:
            writer.best_step = 20
        save(folder.checkpoints, step, writers)
    assert [c.step for c in committed(folder.checkpoints)] == [50, 40, 20]


def test_a_folder_that_vanishes_is_told_later_and_not_made_again_on_another_disk(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    away = folder.root / "away"
    folder.checkpoints.rename(away)
    written = []
    writers[0].save(20, lambda staging: written.append(staging.is_dir()), {})
    assert written == [True], "the other ranks would wait for this one"
    with pytest.raises(CheckpointError, match="could not be written"):
        writers[0].wait()
    assert not folder.checkpoints.exists()
    away.rename(folder.checkpoints)
    assert [c.step for c in committed(folder.checkpoints)] == [10]


def test_a_damaged_checkpoint_costs_no_later_one_its_place(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    save(folder.checkpoints, 20, writers)
    broken = faults.damage_newest(folder, faults.flip_bit)
    found = newest_valid(folder.checkpoints, lambda _: None)
    put_aside_newer(folder.checkpoints, found)
    assert [c.step for c in committed(folder.checkpoints)] == [10]
    assert (folder.checkpoints / f"damaged-{broken.name}").is_dir()
    again = [CheckpointWriter(folder.checkpoints, rank, 2, 1, "def456") for rank in range(2)]
    save(folder.checkpoints, 15, again)
    assert [c.step for c in committed(folder.checkpoints)] == [15]
    put_aside_newer(folder.checkpoints, None)
    assert committed(folder.checkpoints) == []


def test_where_one_rank_cannot_write_the_others_give_up_at_once(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    save(folder.checkpoints, 10, writers)
    target = writers[0].save(20, lambda staging: (staging / "a.pt").write_bytes(b"1") and None, {})
    writers[1].save(20, full, {})
    writers[0].wait_published()  # its own part is there, and it waits for the other one's
    with pytest.raises(CheckpointError, match="No space left"):
        writers[1].wait_published()
    started = time.monotonic()
    for writer in writers:
        writer.abandon()
    assert time.monotonic() - started < 5
    assert not (target / COMMIT).exists()
    assert not any(writer.failed() for writer in writers)
    save(folder.checkpoints, 30, writers)
    assert [c.step for c in committed(folder.checkpoints)] == [30, 10]


def test_a_failed_write_is_told_later_and_leaves_earlier_checkpoints(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    writers[0].save(20, full, {})
    assert writers[0].failed()
    with pytest.raises(CheckpointError, match="No space left"):
        writers[0].wait()
    assert [c.step for c in committed(folder.checkpoints)] == [10]
