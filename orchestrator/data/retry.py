"""Retry reads of remote storage with back-off; raise the last error after a time limit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import DataError

RETRY_S = 120.0
"""How long storage elsewhere may fail. Arrow's own retries end after about 6 s."""
LONGEST_WAIT_S = 10.0
PASSING = re.compile(
    r"HTTP status (429|5\d\d)|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|NETWORK_CONNECTION|"
    r"REQUEST_TIMEOUT|curlCode"
)
"""What passes by itself, in the words of the AWS SDK. A wrong key or a missing file does not."""

T = TypeVar("T")


def with_retries(url: str, work: Callable[[], T]) -> T:
    """Return the result of `work`, which reads `url`; retry while a URL's storage fails in passing.

    Raises what `work` raises: at once for local paths and lasting errors, else after RETRY_S.
    """
    deadline, wait_s = time.monotonic() + RETRY_S, 0.5
    while True:
        try:
            return work()
        except (OSError, DataError) as error:
            if "://" not in url or not passes(error) or time.monotonic() > deadline:
                raise
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def passes(error: BaseException) -> bool:
    """Tell whether an error, or what caused it, is of the kind that passes."""
    if isinstance(error, ConnectionError | TimeoutError) or PASSING.search(str(error)):
        return True
    return error.__cause__ is not None and passes(error.__cause__)
