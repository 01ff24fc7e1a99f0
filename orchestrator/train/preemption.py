"""Watch for a preemption notice: a node that will be taken away commits in time and leaves."""

from __future__ import annotations

import time
from collections.abc import Callable

ASK_EVERY_S = 2.0
"""Asking is a barrier over all ranks, so it is not done at every step."""
EARLY_S = 5.0
"""Stepping ends at least this long before the deadline, or twice as long as a commit took."""
OVERDUE_S = 180.0
"""How long after the deadline a worker that nobody took away lets its group start again. Where a drain has
no deadline, Ray Train ends the group after 120 s."""

Ask = Callable[[], float | None]
"""Collective: when a node of this group will be gone, in Unix seconds; None where none will."""


class PreemptionMonitor:
    """What the cluster has said. Rank 0's clock decides when to ask and when to leave; the pulse tells the rest."""

    def __init__(self, ask: Ask | None, rank: int) -> None:
        self._ask, self._rank = ask, rank
        self._asked_at = time.monotonic()
        self.deadline_s: float | None = None
        self.commit_s = 0.0

    def due(self) -> bool:
        """Rank 0: whether to ask now."""
        waited_s = time.monotonic() - self._asked_at
        return self._rank == 0 and self._ask is not None and waited_s >= ASK_EVERY_S

    def over(self) -> bool:
        """Rank 0: whether the last checkpoint before the deadline has to be taken now."""
        if self._rank or self.deadline_s is None:
            return False
        return time.time() >= self.deadline_s - max(EARLY_S, 2 * self.commit_s)

    def heard(self) -> bool:
        """Ask, all ranks together; whether there is a deadline, or an earlier one, that was not known."""
        self._asked_at = time.monotonic()
        found = self._ask() if self._ask else None
        if found is None or (self.deadline_s is not None and found >= self.deadline_s):
            return False
        self.deadline_s = found
        return True

    def wait_to_be_taken(self) -> None:
        """Stand still until Ray Train ends this group, which costs no restart.

        Returning would mean that training is done. Raises RuntimeError where the node stays.
        """
        while time.time() < (self.deadline_s or 0.0) + OVERDUE_S:
            time.sleep(0.2)
        raise RuntimeError(f"the node that was to be gone {OVERDUE_S:.0f} s ago is still here")
