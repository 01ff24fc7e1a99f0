"""A sweep that was run, read back."""

from __future__ import annotations

from orchestrator.report.trial_log import SweepLog
from orchestrator.run_folder import SweepFolder, read_json


def open_log(folder: SweepFolder) -> SweepLog:
    """The log of a sweep, by the metric its plan names."""
    base = read_json(folder.plan)["base"]
    return SweepLog(folder.log, base["metric"], base["higher_is_better"])
