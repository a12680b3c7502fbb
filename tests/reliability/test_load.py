"""More work than fits: who is refused, who waits and what they hear, who reads slowly, who leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import httpx
import pytest

from tests.reliability.conftest import KEEP_ALIVE, MAX_WAITING, QUEUE_TIMEOUT
from tests.reliability.processes import Running, resident_bytes

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": 5,
}
ENDLESS = ASK | {"max_tokens": 90_000, "stream": True}


@contextmanager
def busy(running: Running, count: int = 2) -> Iterator[None]:
    """Streams that never end hold the engine's places."""
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=30))
        streams = [stack.enter_context(client.stream("POST", running.url + CHAT, json=ENDLESS)) for _ in range(count)]
        bodies = [stream.iter_raw() for stream in streams]  # dropped, they would close the responses
        for body in bodies:
            next(body)
        yield


def test_burst_of_ten_times_what_fits(at_rest: Running) -> None:
    """Of eighty at once those beyond the bound are told when to come back; those that were taken finish, and later
    ones are taken again."""
    count = 10 * MAX_WAITING

    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            asks = [client.post(at_rest.url + CHAT, json=ASK | {"max_tokens": 20}) for _ in range(count)]
            return await asyncio.gather(*asks)

    responses = asyncio.run(burst())
    taken = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 503]
    assert len(taken) >= MAX_WAITING and len(taken) + len(refused) == count and refused
    assert all(response.json()["usage"]["completion_tokens"] == 20 for response in taken)
    for response in refused:
        assert response.json()["error"]["code"] == "overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert at_rest.metric("admission_rejections_total") >= len(refused)
    assert httpx.post(at_rest.url + CHAT, json=ASK, timeout=20).status_code == 200


def test_who_waits_hears_signs_of_life_until_the_time_is_over(at_rest: Running) -> None:
    """In the queue a stream gets comments, and after the queue's time the error; a whole answer gets empty lines and
    the error's body."""

    async def stream(client: httpx.AsyncClient) -> list[str]:
        async with client.stream("POST", at_rest.url + CHAT, json=ASK | {"stream": True}) as response:
            assert response.status_code == 200
            return [line async for line in response.aiter_lines() if line]

    async def whole(client: httpx.AsyncClient) -> bytes:
        received = b""
        async with client.stream("POST", at_rest.url + CHAT, json=ASK) as response:
            assert response.status_code == 200
            async for piece in response.aiter_raw():
                received += piece
        return received

    async def both() -> tuple[list[str], bytes]:
        async with httpx.AsyncClient(timeout=30) as client:
            return await asyncio.gather(stream(client), whole(client))

    with busy(at_rest):
        start = time.monotonic()
        (*comments, last), received = asyncio.run(both())
        seconds = time.monotonic() - start
    assert set(comments) == {": keep-alive"}
    for error in (json.loads(last.removeprefix("data: ")), json.loads(received)):
        assert f"no token came within {QUEUE_TIMEOUT:g} s" in error["error"]["message"]
    for count in (len(comments), len(received) - len(received.lstrip())):
        assert QUEUE_TIMEOUT / KEEP_ALIVE / 4 <= count <= QUEUE_TIMEOUT / KEEP_ALIVE + 1
    assert QUEUE_TIMEOUT <= seconds < QUEUE_TIMEOUT + 5


def test_a_whole_body_comes_after_empty_lines(at_rest: Running) -> None:
    """What was preceded by signs of life is the answer that comes without them."""
    alone = httpx.post(at_rest.url + CHAT, json=ASK, timeout=20).json()
    with ExitStack() as holders, httpx.Client(timeout=20) as client:
        holders.enter_context(busy(at_rest))
        with client.stream("POST", at_rest.url + CHAT, json=ASK) as response:
            pieces = response.iter_raw()
            first = next(pieces)
            holders.close()
            body = first + b"".join(pieces)
    assert first == b"\n"
    assert json.loads(body)["choices"] == alone["choices"]


def test_slow_reader(at_rest: Running) -> None:
    """While a long stream waits for a reader that does not read, the server's memory stays as it is, others are
    served, and then all of it is there."""
    ask = ASK | {"max_tokens": 10_000, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(ask).encode()
    host, port = at_rest.url.removeprefix("http://").split(":")
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        at_rest.wait_for(lambda: at_rest.counts()[0] == 1)
        time.sleep(0.5)
        before = resident_bytes(at_rest.process.pid)
        at_rest.wait_for(lambda: at_rest.counts()[0] == 0, 90)
        assert resident_bytes(at_rest.process.pid) - before < 8_000_000
        assert httpx.post(at_rest.url + CHAT, json=ASK, timeout=20).status_code == 200
        reader.settimeout(30)
        received = bytearray()
        while piece := reader.recv(1 << 16):
            received += piece
    assert b'"completion_tokens":10000' in received and b"data: [DONE]" in received


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("streams", [True, False])
def test_who_leaves_is_forgotten(at_rest: Running, streams: bool, queued: bool) -> None:
    """A client that hangs up while its answer comes or is waited for leaves nothing behind; `at_rest` looks."""
    with busy(at_rest) if queued else nullcontext():
        num_before = sum(at_rest.counts())
        ask = ENDLESS | {"stream": streams}
        with httpx.Client(timeout=20) as client, client.stream("POST", at_rest.url + CHAT, json=ask) as response:
            pieces = response.iter_raw()  # dropped, it would close the response
            next(pieces)
            at_rest.wait_for(lambda: sum(at_rest.counts()) == num_before + 1)
        at_rest.wait_for(lambda: sum(at_rest.counts()) == num_before, 2)
