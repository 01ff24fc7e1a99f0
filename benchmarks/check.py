"""CPU seconds of `orchestrator check` beside those of a bare interpreter, medians of several runs.

python benchmarks/check.py JOB.yaml [--runs 9]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys


def main() -> None:
    """Print one line per command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    commands = {
        "python -c pass": ["-c", "pass"],
        "orchestrator check": ["-m", "orchestrator", "check", given.job],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(given.runs):  # side by side, so that other load falls on both
        for name, arguments in commands.items():
            seconds[name].append(cpu_seconds([sys.executable, *arguments]))
    for name, found in seconds.items():
        print(f"{name:20} {statistics.median(found):.2f} s")


def cpu_seconds(command: list[str]) -> float:
    """Return the CPU seconds, user and system, of one run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
