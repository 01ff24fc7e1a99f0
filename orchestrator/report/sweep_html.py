"""The sweep's report."""

from __future__ import annotations

from pathlib import Path

from orchestrator.run_folder import SweepFolder


def write_sweep_report(folder: SweepFolder) -> Path:
    """Write `folder.report`; returns its path."""
    return folder.report
