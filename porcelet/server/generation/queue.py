"""The bounded queue in front of an engine: who is one too many is told when to come back.

That time is an estimate by Little's law: as many requests as are under way end within the time that one takes, so
after half of that time half of them have gone. Requests are counted, not tokens: fair shares are the engine's. One
API key may have half of the places, so that nobody can keep everybody else out; whoever sits at this machine may have
all of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from porcelet.errors import CapacityError
from porcelet.server.generation.watch import LOCAL, Caller

WEIGHT = 0.1  # of the last request in the moving average
LONGEST_SECONDS = 60
LEAST_SHARE = 8  # places that one key may have in the smallest queue


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
        self._of_caller: Counter[str] = Counter()
        self.num_rejected = {"queue_full": 0, "queue_timeout": 0}
        self._seconds = 2.0  # that a request takes

    @property
    def retry_after(self) -> int:
        """Seconds after which it should be worth asking again."""
        return min(max(1, math.ceil(self._seconds / 2)), LONGEST_SECONDS)

    def share(self, caller: Caller) -> int:
        """Places that one caller may have."""
        return self.max_running if caller == LOCAL else max(LEAST_SHARE, self.max_running // 2)

    @contextmanager
    def place(self, caller: Caller, count: int = 1) -> Iterator[None]:
        """Be under way with `count` requests; `caller` is who asks.

        Raises:
            OverloadedError: too many are, in all or of this caller.
        """
        self._check(caller, count)
        self.num_running += count
        self._of_caller[caller.id] += count
        start = time.monotonic()
        try:
            yield
        finally:
            self.num_running -= count
            self._of_caller[caller.id] -= count
            if not self._of_caller[caller.id]:
                del self._of_caller[caller.id]
            self._seconds += WEIGHT * (time.monotonic() - start - self._seconds)

    def _check(self, caller: Caller, count: int) -> None:
        """Several requests at once may go beyond the bounds where nothing else is under way: they would never pass."""
        for num_running, most, whose in (
            (self.num_running, self.max_running, ""),
            (self._of_caller[caller.id], self.share(caller), " of yours"),
        ):
            if num_running and num_running + count > most:
                self.num_rejected["queue_full"] += 1
                text = f"{num_running} requests{whose} to {self.model} are under way; come back in {self.retry_after} s"
                raise OverloadedError(text, self.retry_after)

    def given_up(self) -> OverloadedError:
        """The error of a request that has waited for its first token for too long."""
        self.num_rejected["queue_timeout"] += 1
        text = f"no token came within {self.timeout:g} s: {self.model} is overloaded; come back later"
        return OverloadedError(text, self.retry_after)
