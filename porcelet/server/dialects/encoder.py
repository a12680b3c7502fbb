"""Dialects whose streams are typed events. One encoder is fed a generation's events: a stream is what it says on the
way, a whole answer is what it holds at the end, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from porcelet.errors import PorceletError
from porcelet.server.generation.events import Event, Events
from porcelet.server.sse import Frames, frame, stream, whole


class Encoder(Protocol):
    """Builds one answer."""

    def encode(self, event: Event) -> Iterator[dict[str, Any]]:
        """What the next event adds to the stream."""

    def fail(self, problem: PorceletError) -> Iterator[dict[str, Any]]:
        """How a stream that has begun says that it fails."""

    def whole(self) -> dict[str, Any]:
        """The answer, once all events are encoded."""


async def send(request: Request, encoder: Encoder, events: Events, streamed: bool, keep_alive: float) -> Response:
    """The answer as a stream, or whole.

    Raises:
        PorceletError: it failed before anything was sent.
        ClientDisconnect: the client left before that.
    """
    if streamed:
        return await stream(
            request, _frames(encoder, events), lambda problem: _joined(encoder.fail(problem)), keep_alive
        )
    return await whole(request, _whole(encoder, events), keep_alive)


async def _frames(encoder: Encoder, events: Events) -> Frames:
    async with aclosing(events):
        async for event in events:
            if frames := _joined(encoder.encode(event)):
                yield frames


async def _whole(encoder: Encoder, events: Events) -> bytes:
    async with aclosing(events):
        async for event in events:
            for _ in encoder.encode(event):
                pass
    return msgspec.json.encode(encoder.whole())


def _joined(bodies: Iterator[dict[str, Any]]) -> bytes:
    return b"".join(frame(body, body["type"]) for body in bodies)
