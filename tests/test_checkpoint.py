"""A checkpoint counts only with its commit marker and its checksums."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import faults
import pytest

from orchestrator.errors import CheckpointError
from orchestrator.run_folder import RunFolder, write_json
from orchestrator.train.checkpoint import (
    COMMIT,
    SHARED_MEMORY,
    CheckpointWriter,
    Committed,
    committed,
    damage,
    newest_valid,
    put_aside_newer,
    remove_uncommitted,
)
from orchestrator.train.setup import progress_in


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


DAMAGED_MARKERS = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "list": lambda text: "[]",
    "null": lambda text: "null",
    "number": lambda text: "20",
    "other fields": lambda text: '{"other": 1}',
    "edited step": lambda text: text.replace('"step": 20', '"step": 21'),
    "no checksum": lambda text: re.sub(r',\s*"sha256": "\w+"\n}', "}", text),
    "later format": lambda text: text.replace('"format": 2', '"format": 3'),
    "nested": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("how", DAMAGED_MARKERS)
def test_a_damaged_commit_marker_is_named_and_its_checkpoint_passed_over(
    how: str, folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    save(folder.checkpoints, 20, writers)
    newest = committed(folder.checkpoints)[0]
    marker = newest.folder / COMMIT
    marker.write_text(DAMAGED_MARKERS[how](marker.read_text()))
    warnings: list[str] = []
    found = newest_valid(folder.checkpoints, warnings.append)
    assert found is not None
    assert found.step == 10
    assert [newest.folder.name in text for text in warnings] == [True]
    put_aside_newer(folder.checkpoints, found)
    assert (folder.checkpoints / f"damaged-{newest.folder.name}").is_dir()


def test_any_flipped_bit_of_a_commit_marker_is_noticed(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 51, writers)
    marker = committed(folder.checkpoints)[0].folder / COMMIT
    whole = marker.read_bytes()
    unnoticed = []
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        marker.write_bytes(data)
        if committed(folder.checkpoints):
            unnoticed.append((bit, bytes(data)))
    assert unnoticed == []
    marker.write_bytes(whole)
    assert [c.step for c in committed(folder.checkpoints)] == [51]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "20"}, {"step": None}, {"step": -1}, {"step": True}, {"world_size": 0}, {"world_size": "2"},
        {"stage": "x"}, {"time": "now"}, {"progress": 5}, {"progress": {"step": 19}}, {"step": 24},
    ],
)  # fmt: skip
def test_wrong_values_in_a_marker_without_a_checksum_are_no_raw_errors(
    change: dict[str, Any], folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 20, writers)
    marker = committed(folder.checkpoints)[0].folder / COMMIT
    version_1 = {"step": 20, "world_size": 2, "time": 1.5, "stage": 2, "progress": {"step": 20}}
    write_json(marker, version_1)
    found = newest_valid(folder.checkpoints, lambda _: None)
    assert found is not None
    assert found.step == 20, "markers of version 1 are still read"
    write_json(marker, {**version_1, **change})
    warnings: list[str] = []
    assert newest_valid(folder.checkpoints, warnings.append) is None
    assert len(warnings) == 1


def test_a_marker_in_another_checkpoints_folder_is_damaged(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 20, writers)
    (one,) = committed(folder.checkpoints)
    one.folder.rename(folder.checkpoints / "step-00000030-abc123")
    assert committed(folder.checkpoints) == []


def test_a_changed_list_of_files_is_noticed(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    (one,) = committed(folder.checkpoints)
    (one.folder / "files-00001.json").write_text("{}\n")
    assert damage(one) == "files-00001.json does not match its checksum"


def test_damaged_checkpoints_are_removed_once_enough_newer_ones_are_there(
    folder: RunFolder, writers: list[CheckpointWriter]
) -> None:
    save(folder.checkpoints, 10, writers)
    save(folder.checkpoints, 20, writers)
    faults.truncate(committed(folder.checkpoints)[0].folder / COMMIT)
    put_aside_newer(folder.checkpoints, newest_valid(folder.checkpoints, lambda _: None))
    broken = folder.checkpoints / "damaged-step-00000020-abc123"
    again = [CheckpointWriter(folder.checkpoints, rank, 2, 2, "def456") for rank in range(2)]
    save(folder.checkpoints, 20, again)
    assert broken.is_dir(), (
        "its data may be of use while no more than one newer checkpoint is there"
    )
    save(folder.checkpoints, 30, again)
    assert not broken.exists()


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
    assert time.monotonic() - started < 60, "it waits for the other rank without end"
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


@pytest.mark.parametrize("facts", [{}, {"progress": {"of_a_later_version": 1}}])
def test_progress_of_another_version_is_named(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another version"):
        progress_in(Committed(tmp_path, facts))
    assert progress_in(Committed(tmp_path, {"progress": {"step": 3}})).step == 3
