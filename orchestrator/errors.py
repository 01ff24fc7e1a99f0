"""The errors a user meets: each names the field, the value, the limit and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.redaction import REMOVED, SECRET_KEY, SECRET_NAME, redact


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a job, in the words of the person who wrote it."""

    field: str
    why: str
    fix: str = ""
    value: Any = None

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self._shown_value()}"
        return redact(f"{self.field}{shown}: {self.why}" + (f" → {self.fix}" if self.fix else ""))

    def _shown_value(self) -> str:
        name = self.field.rpartition(".")[2]
        secret = SECRET_NAME.search(name) or SECRET_KEY.search(name)
        return REMOVED if secret and not isinstance(self.value, bool | None) else repr(self.value)


class OrchestratorError(Exception):
    """Base of every error this product raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """The message without secrets that a library's error or a user's value brought in."""
        return redact(super().__str__())


class SpecError(OrchestratorError):
    """The job file is wrong; `problems` lists everything found, not the first one."""

    exit_code = 2

    def __init__(self, problems: list[Problem], source: str = "job") -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {p}" for p in problems)
        super().__init__(f"{source}: {count}\n{lines}")


class DataError(OrchestratorError):
    """Input rows that cannot be used, or prepared data that is damaged."""


class PlanError(OrchestratorError):
    """The job is well-formed but cannot run on the cluster it was planned for."""

    exit_code = 2


class StorageError(OrchestratorError, OSError):
    """A file that cannot be written or read: a full disk, missing permissions, a folder that is gone."""


class DamagedFileError(OrchestratorError, ValueError):
    """A file of a run that is torn, edited by hand or damaged; names the file and the fix."""


class CheckpointError(OrchestratorError):
    """No usable checkpoint where one is needed, or one that cannot be written."""


class RunExistsError(OrchestratorError):
    """A run of that name exists and cannot be continued by this job."""

    exit_code = 2


class TrainingError(OrchestratorError):
    """Training ended without a finished model; says where it stands and how to go on."""
