"""Prepared data in the words of the plan."""

from __future__ import annotations

from typing import Any

from orchestrator.data.prepare import Prepared, Split
from orchestrator.data.shards import open_shards
from orchestrator.model.config import load_config
from orchestrator.model.tokenizer import check_tokens, largest_id, load_tokenizer, vocabulary_size
from orchestrator.spec import JobSpec
from orchestrator.values import Frozen


class DataStats(Frozen):
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


def data_facts(prepared: Prepared) -> DataStats:
    """A prepared split in the words of the plan."""
    manifest, teacher = prepared.manifest, prepared.teacher
    derived = {"folder", "teacher_folder", "teacher_bytes"}
    names = [name for name in DataStats.model_fields if name not in derived]
    return DataStats(
        folder=str(prepared.folder),
        teacher_folder=str(teacher.folder) if teacher else None,
        teacher_bytes=teacher.manifest.size_bytes if teacher else 0,
        **{name: getattr(manifest, name) for name in names},
    )


def check_rows(spec: JobSpec, labels: tuple[str, ...], prepared: dict[Split, Prepared]) -> None:
    """Raise OrchestratorError where prepared rows hold tokens that the model does not embed."""
    tokenizer = load_tokenizer(spec)
    check_tokens(spec, labels, tokenizer, _largest_token(spec, labels, tokenizer, prepared))


def _largest_token(
    spec: JobSpec, labels: tuple[str, ...], tokenizer: Any, prepared: dict[Split, Prepared]
) -> int:
    """The largest token id that the prepared rows may hold.

    The tokenizer's largest, where the model embeds it; else the rows are looked through.
    """
    if tokenizer is None:
        return 0
    known, largest = vocabulary_size(load_config(spec, labels)), largest_id(tokenizer)
    if known is None or largest < known:
        return largest
    readers = [open_shards(one.folder, one.manifest) for one in prepared.values()]
    columns = [reader.column(name) for reader in readers for name in spec.task.token_features]
    return max((int(column.max()) for column in columns if len(column)), default=0)
