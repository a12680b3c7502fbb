"""A growing list of numbered events that any number of readers follow, each at its own pace and from any number on.

A reader is nothing but a position, so one that stands still costs nothing, and all see the same events.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from porcelet.server.errors import FieldError
from porcelet.server.sse import Frames

OPENING = b": stream\n\n"  # the headers go out at once, whatever the first event waits for
MAX_FRAMES = 256  # at a time: who reads it again from the beginning does not get it as one block


class Buffer:
    """The events of one stream, numbered from 1, as server-sent events."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._closed = False
        self._grown = asyncio.Event()

    def add(self, event: dict[str, Any]) -> None:
        """The next event."""
        assert not self._closed
        self._frames.append(b"id: %d\ndata: %b\n\n" % (len(self._frames) + 1, msgspec.json.encode(event)))
        self._wake()

    def close(self) -> None:
        """Nothing more will come; readers end after the last event."""
        self._closed = True
        self._wake()

    def require(self, after: int) -> None:
        """Refuse a position that nobody can have reached.

        Raises:
            FieldError: it is beyond the last event.
        """
        if after > len(self._frames):
            raise FieldError("after", f"after is {after}, but this stream has {len(self._frames)} events so far")

    async def read(self, after: int = 0) -> Frames:
        """The events beyond number `after`, waiting for more until it is closed."""
        yield OPENING
        while True:
            grown = self._grown
            if frames := self._frames[after : after + MAX_FRAMES]:
                after += len(frames)
                yield b"".join(frames)
            elif self._closed:
                return
            else:
                await grown.wait()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()
