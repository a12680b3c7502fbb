"""Answers over HTTP that take a while: server-sent events or one body, with signs of life and an end when nobody waits.

A stream's status is decided by its first frame, so what is refused is refused properly. Only where that takes longer
than the keep-alive interval do the headers go out first; an error is then the stream's last event. A whole body is
preceded by empty lines in that case, as DeepSeek's is, and an error's body takes the answer's place, although the
status says 200. Breaking off instead would hide the reason and make clients' libraries ask again at once, by
themselves, in a queue that is full; silence until it is certain would make proxies give up during a long prompt.

A reader that is slow makes the generator wait, and its outputs become one (engine/client.py), so what is kept for it
is bounded by the answer's own length.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from porcelet.errors import PorceletError
from porcelet.server.errors import fault_body, fault_of

log = logging.getLogger(__name__)

Frames = AsyncGenerator[bytes, None]
Result = TypeVar("Result")
KEEP_ALIVE = b": keep-alive\n\n"


def frame(body: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event with a JSON body."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


async def stream(
    request: Request, frames: Frames, failed: Callable[[PorceletError], bytes], keep_alive: float
) -> Response:
    """Send frames as they come. `failed` writes the frame of an error that comes too late for a status.

    Raises:
        PorceletError: the first frame's.
        ClientDisconnect: the client left before it.
    """
    first = asyncio.ensure_future(anext(frames))
    try:
        await _unless_gone(request.receive, asyncio.wait({first}, timeout=keep_alive))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.wait({first})
        await frames.aclose()
        raise
    return EventStream(_alive(first, frames, failed, keep_alive))


async def whole(request: Request, work: Awaitable[bytes], keep_alive: float) -> Response:
    """One JSON body, whenever `work` has it; it is cancelled when the client hangs up.

    Raises:
        PorceletError: that of `work`.
        ClientDisconnect: the client left first.
    """
    task = asyncio.ensure_future(work)
    try:
        await _unless_gone(request.receive, asyncio.wait({task}, timeout=keep_alive))
        if task.done():
            return Response(task.result(), media_type="application/json")
    except BaseException:
        task.cancel()
        await asyncio.wait({task})
        raise
    return EventStream(_lines_before(task, request.url.path, keep_alive), "application/json")


class EventStream(StreamingResponse):
    """A streamed answer whose generator is closed as soon as the client is gone, and before the answer counts as over.

    Starlette's own way of hanging up cancels again and again, also what the generator does to close.
    """

    def __init__(self, frames: Frames, media_type: str = "text/event-stream") -> None:
        # nginx, for one, would keep frames until it has many.
        super().__init__(
            frames, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self.frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.frames):
            with suppress(ClientDisconnect):
                await _unless_gone(receive, self.stream_response(send))


async def _alive(
    first: asyncio.Future[bytes], frames: Frames, failed: Callable[[PorceletError], bytes], keep_alive: float
) -> Frames:
    """The frames, with a comment wherever none came for a while."""
    pending = first
    try:
        while True:
            if not (await asyncio.wait({pending}, timeout=keep_alive))[0]:
                yield KEEP_ALIVE
                continue
            yield pending.result()
            pending = asyncio.ensure_future(anext(frames))
    except StopAsyncIteration:
        return
    except PorceletError as problem:
        yield failed(problem)
    finally:
        pending.cancel()
        await asyncio.wait({pending})
        await frames.aclose()


async def _lines_before(task: asyncio.Future[bytes], path: str, keep_alive: float) -> Frames:
    try:
        while not task.done():
            yield b"\n"
            await asyncio.wait({task}, timeout=keep_alive)
        yield task.result()
    except PorceletError as problem:
        log.warning("an answer whose status was sent ends in an error: %s", problem)
        yield json.dumps(fault_body(fault_of(problem), path)).encode()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up first, and has ended then.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
