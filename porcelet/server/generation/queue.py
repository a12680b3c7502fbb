"""The bounded queue in front of an engine: who is one too many is told when to come back.

That time is an estimate by Little's law: as many requests as are under way end within the time that one takes, so
after half of that time half of them have gone. Requests are counted, not tokens: fair shares are the engine's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from porcelet.errors import CapacityError

WEIGHT = 0.1  # of the last request in the moving average
LONGEST_SECONDS = 60


class OverloadedError(CapacityError):
    """Too many requests are under way, or one has waited for too long."""

    code = "overloaded"


class Queue:
    """Counts what is under way at one model. `num_rejected` are counts by reason."""

    def __init__(self, model: str, max_running: int, timeout: float) -> None:
        self.model = model
        self.max_running = max_running
        self.timeout = timeout
        self.num_running = 0
        self.num_rejected = {"queue_full": 0, "queue_timeout": 0}
        self._seconds = 2.0  # that a request takes

    @property
    def retry_after(self) -> int:
        """Seconds after which it should be worth asking again."""
        return min(max(1, math.ceil(self._seconds / 2)), LONGEST_SECONDS)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Be under way.

        Raises:
            OverloadedError: too many are.
        """
        if self.num_running >= self.max_running:
            self.num_rejected["queue_full"] += 1
            text = f"{self.num_running} requests to {self.model} are under way; come back in {self.retry_after} s"
            raise OverloadedError(text, self.retry_after)
        self.num_running += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.num_running -= 1
            self._seconds += WEIGHT * (time.monotonic() - start - self._seconds)

    def given_up(self) -> OverloadedError:
        """The error of a request that has waited for its first token for too long."""
        self.num_rejected["queue_timeout"] += 1
        text = f"no token came within {self.timeout:g} s: {self.model} is overloaded; come back later"
        return OverloadedError(text, self.retry_after)
