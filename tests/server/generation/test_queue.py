"""The queue in front of an engine: who gets a place."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from porcelet.server.generation.queue import OverloadedError, Queue
from porcelet.server.generation.watch import LOCAL, Caller

ADA, BOB = Caller("ada", "Ada", "ada"), Caller("bob", "Bob", "bob")


def test_one_caller_has_half_of_the_places() -> None:
    """However many requests one key sends, the others' find room; who sits at this machine may have all of it."""
    queue = Queue("tiny", 20, 1.0)
    with ExitStack() as places:
        for _ in range(10):
            places.enter_context(queue.place(ADA))
        with pytest.raises(OverloadedError, match="10 requests of yours") as caught, queue.place(ADA):
            pass
        assert caught.value.retry_after
        for _ in range(10):
            places.enter_context(queue.place(BOB))
        with pytest.raises(OverloadedError, match="20 requests to tiny"), queue.place(LOCAL):
            pass
    assert queue.num_running == 0 and queue.num_rejected["queue_full"] == 2
    with ExitStack() as places:
        for _ in range(20):
            places.enter_context(queue.place(LOCAL))


def test_several_places_at_once() -> None:
    """A call of several requests gets a place for each or none; one that is larger than the queue waits for it to be
    empty."""
    queue = Queue("tiny", 20, 1.0)
    with queue.place(ADA, 6):
        assert queue.num_running == 6
        with pytest.raises(OverloadedError, match="of yours"), queue.place(ADA, 5):
            pass
        assert queue.num_running == 6
    with queue.place(ADA, 128):
        assert queue.num_running == 128
