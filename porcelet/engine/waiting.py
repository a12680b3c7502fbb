"""Who is next: the queue of requests that wait to run, or to run again.

Lower priority numbers go first. Among equals it is the turn of the tenant that has had the fewest tokens computed
(virtual token counter: Sheng et al., OSDI 2024, arXiv 2401.00588), and within a tenant of the request that came first.
A tenant that was away starts from what it had had, but not below the least served one that is here: it saved nothing
up.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator

from porcelet.engine.sequence import Sequence

MAX_REMEMBERED = 64  # tenants that are gone


class WaitingQueue:
    """Sequences by tenant, and what each tenant has had."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}
        self._present: Counter[str] = Counter()  # sequences of each tenant, waiting and running
        self._served: dict[str, int] = {}  # tokens computed for each tenant that is present, or was

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def enter(self, sequence: Sequence) -> None:
        """A sequence is new here: it counts as present until `leave`."""
        tenant = sequence.request.tenant
        if tenant not in self._present:
            self._served[tenant] = max(self._served.get(tenant, 0), self._least())
        self._present[tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        tenant = sequence.request.tenant
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            if len(self._served) > 2 * len(self._present) + MAX_REMEMBERED or not self._present:
                self._forget()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """So many tokens of a tenant's were computed."""
        self._served[tenant] += num_tokens

    def push(self, sequence: Sequence) -> None:
        insort(self._queues.setdefault(sequence.request.tenant, []), sequence, key=_order)

    def first(self) -> Sequence | None:
        """Whose turn it is; it stays in the queue."""
        heads = (queue[0] for queue in self._queues.values())
        return min(heads, key=lambda s: (s.request.priority, self._served[s.request.tenant], s.arrival), default=None)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        self._queues[tenant].remove(sequence)
        if not self._queues[tenant]:
            del self._queues[tenant]

    def _least(self) -> int:
        return min((self._served[tenant] for tenant in self._present), default=0)

    def _forget(self) -> None:
        """Drop those that are gone and would start from the least served anyway; all when nobody is here."""
        least = self._least() if self._present else max(self._served.values())
        self._served = {t: count for t, count in self._served.items() if t in self._present or count > least}


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.request.priority, sequence.arrival, sequence.index
