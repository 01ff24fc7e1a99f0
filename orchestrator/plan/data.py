"""Prepared data in the words of the plan."""

from __future__ import annotations

from orchestrator.data.prepare import Prepared
from orchestrator.values import Frozen


class DataFacts(Frozen):
    """One prepared split, as the plan needs it."""

    folder: str
    rows: int
    tokens: int
    size_bytes: int = 0
    """Of the shards, and so about of the rows in memory."""
    target_tokens: int
    longest_tokens: int
    longest_target_tokens: int = 0
    truncated_rows: int
    bad_rows: int
    teacher_folder: str | None = None
    """Where the teacher's outputs of these rows lie."""
    teacher_bytes: int = 0


def data_facts(prepared: Prepared) -> DataFacts:
    """A prepared split in the words of the plan."""
    manifest, teacher = prepared.manifest, prepared.teacher
    derived = {"folder", "teacher_folder", "teacher_bytes"}
    names = [name for name in DataFacts.model_fields if name not in derived]
    return DataFacts(
        folder=str(prepared.folder),
        teacher_folder=str(teacher.folder) if teacher else None,
        teacher_bytes=teacher.manifest.size_bytes if teacher else 0,
        **{name: getattr(manifest, name) for name in names},
    )
