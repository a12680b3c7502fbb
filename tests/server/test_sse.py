"""Answers that take a while: what is refused at once, how they end, what is kept for a slow reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from porcelet.engine.client import MAX_PIECES, _Inbox
from porcelet.errors import CapacityError, EngineError, PorceletError
from porcelet.server.errors import install
from porcelet.server.sse import KEEP_ALIVE, EventStream, Frames, stream, whole
from porcelet.types import Output
from tests.server.conftest import Server

CHAT = "/v1/chat/completions"
SECONDS = 0.05  # of silence until there is a sign of life


def failed(problem: PorceletError) -> bytes:
    return f"error: {problem}\n\n".encode()


def ask(frames: Frames) -> httpx.Response:
    """The answer that an application makes of frames."""
    app = FastAPI()
    install(app)

    @app.get("/")
    async def route(request: Request) -> Response:
        return await stream(request, frames, failed, SECONDS)

    return asyncio.run(got(app, "/"))


async def got(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.get(path)


def test_an_early_error_is_a_status() -> None:
    """What fails before the first frame is answered as an error, with the time to come back."""

    async def frames() -> AsyncGenerator[bytes, None]:
        raise CapacityError("full", 7)
        yield b""

    response = ask(frames())
    assert response.status_code == 503 and response.headers["retry-after"] == "7"


def test_a_late_error_is_the_last_event() -> None:
    """Once signs of life were sent, the error comes in the stream, and nothing after it."""

    async def frames() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(3.5 * SECONDS)
        yield b"data: 1\n\n"
        raise EngineError("late")

    response = ask(frames())
    assert response.status_code == 200
    assert response.content.startswith(KEEP_ALIVE)
    assert response.content.lstrip(KEEP_ALIVE).endswith(b"1\n\nerror: late\n\n")


def test_a_late_error_of_a_whole_body_is_that_body() -> None:
    """After the empty lines comes the error in its usual form, so that clients can say what was wrong."""
    app = FastAPI()

    @app.get("/v1/messages")
    async def route(request: Request) -> Response:
        async def work() -> bytes:
            await asyncio.sleep(3.5 * SECONDS)
            raise CapacityError("overloaded")

        return await whole(request, work(), SECONDS)

    response = asyncio.run(got(app, "/v1/messages"))
    assert response.content.startswith(b"\n") and response.headers["x-accel-buffering"] == "no"
    assert response.json()["type"] == "error" and response.json()["error"]["message"] == "overloaded"


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_left_is_closed_before_the_answer_is_over(waits: bool) -> None:
    """When a client hangs up, its generator has run its cleaning to the end, however long, before the answer returns:
    while a frame is awaited as while one is sent."""
    closed = False

    async def frames() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            yield b"data: 1\n\n"
            if waits:
                await asyncio.sleep(20)
            yield b"data: 2\n\n"
        finally:
            await asyncio.sleep(SECONDS)
            closed = True

    async def main() -> None:
        sent = asyncio.Event()

        async def receive() -> dict[str, str]:
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message.get("body"):
                sent.set()
                if not waits:
                    await asyncio.sleep(20)

        request = Request({"type": "http", "path": "/", "headers": []}, receive)
        answer = await stream(request, frames(), failed, 10.0)
        assert isinstance(answer, EventStream)
        await asyncio.wait_for(answer(request.scope, receive, send), 5)
        assert closed

    asyncio.run(main())


def test_over_long_prompts_are_refused_at_once(server: Server) -> None:
    """A prompt that can never fit is a 400 within moments, though another request is under way."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 20_000}], "temperature": 0}
    small = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": True}
    with httpx.stream("POST", server.url + CHAT, json=small, timeout=20) as other:
        pieces = other.iter_raw()
        next(pieces)
        start = time.monotonic()
        response = httpx.post(server.url + CHAT, json=body, timeout=20)
        assert response.status_code == 400 and "tokens" in response.json()["error"]["message"]
        assert time.monotonic() - start < 5


def test_what_waits_for_a_slow_reader_is_joined() -> None:
    """However many outputs have come, few are kept; nothing of them is lost."""
    inbox, count = _Inbox(1), 20 * MAX_PIECES

    def output(number: int) -> Output:
        reason = "length" if number == count - 1 else None
        return Output(request_id="a", tokens=(number,), logprobs=(0.0,), num_generated=number + 1, finish_reason=reason)

    for number in range(count):
        inbox.put(output(number))
        assert sum(map(len, inbox._outputs.values())) < MAX_PIECES
    (taken,) = asyncio.run(inbox.take())
    assert taken.tokens == tuple(range(count)) and taken.finish_reason == "length" and inbox.finished
