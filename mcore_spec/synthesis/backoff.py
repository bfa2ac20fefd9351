"""How long to wait before a server is asked again."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

# Enough for any delay, and far from what a float cannot hold.
_MAX_DOUBLINGS = 64


class Backoff(NamedTuple):
    """Waiting times that double, spread at random so that clients do not come back all at once.

    Attributes:
        max_retries: further attempts after the first one.
        first_delay: seconds before the first of them, at most.
        longest_delay: seconds before any of them, at most.
    """

    max_retries: int = 6
    first_delay: float = 1.0
    longest_delay: float = 60.0

    def delay(self, num_failed: int, *, retry_after: float | None = None) -> float:
        """Seconds to wait.

        Args:
            num_failed: attempts so far, at least 1.
            retry_after: seconds that the server asks for, at least; these are always waited.
        """
        num_doublings = min(num_failed - 1, _MAX_DOUBLINGS)
        ceiling = min(self.longest_delay, self.first_delay * 2.0**num_doublings)
        if retry_after is None:
            return ceiling * random.uniform(0.5, 1.0)
        return retry_after + ceiling * random.uniform(0.0, 0.5)


def read_retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; None without one that can be read.

    The header holds seconds or a date (RFC 9110, 10.2.3).

    Args:
        value: of the header.
        now: the time that a date is compared with (default: this moment).
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    # "nan" and "inf" are numbers to Python and nothing that can be waited for.
    return max(seconds, 0.0) if seconds < float("inf") else None
