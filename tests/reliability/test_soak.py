"""A random mix of everything for a while: each greedy answer is what its prompt gets alone, and nothing grows."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reliability.processes import Running, resident_bytes, start

CHAT = "/v1/chat/completions"
NUM_CLIENTS = 12
MAX_GROWTH = 16_000_000  # bytes, of either process, once every kind of request has been served


@pytest.fixture(scope="module")
def crowded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A cache that is too small for all, so that sequences are preempted; guesses, prefixes and chunks."""
    engine = "max_sequences = 8\nmax_batch_tokens = 48\ncache_tokens = 640\nspeculation = 'lookup'"
    with start(folder, tmp_path_factory.mktemp("crowded"), engine=engine) as running:
        yield running


def asks(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Greedy requests, some of which begin alike."""
    beginning = "the same beginning of many conversations, longer than a page of the cache holds: " * 2
    texts = [f"{beginning if rng.random() < 0.5 else ''}{rng.randbytes(rng.randrange(20)).hex()}" for _ in range(count)]
    return [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": rng.randrange(1, 60),
        }
        for text in texts
    ]


@pytest.mark.parametrize("seconds", [3, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_soak(crowded: Running, seconds: float) -> None:
    """Streams and whole answers, some of them left halfway, between noise that is drawn at random."""
    rng = random.Random(seconds)
    known = asks(rng, 24)
    alone = [httpx.post(crowded.url + CHAT, json=ask, timeout=60).json()["choices"][0] for ask in known]
    expected = [(choice["message"]["content"], choice["finish_reason"]) for choice in alone]
    asyncio.run(load(crowded, known, expected, min(seconds / 3, 20), rng))
    before = sizes(crowded)
    num_right = asyncio.run(load(crowded, known, expected, seconds, rng))
    assert num_right >= seconds
    crowded.wait_for(lambda: crowded.counts() == (0, 0))
    assert crowded.metric("kv_cache_usage_perc") == crowded.metric("requests_in_flight") == 0
    assert crowded.metric("num_preemptions_total") and crowded.metric("spec_decode_num_accepted_tokens_total")
    assert crowded.metric("prefix_cache_hits_total") and crowded.metric("engine_restarts_total") == 0
    grown = [after - size for after, size in zip(sizes(crowded), before, strict=True)]
    assert max(grown) < MAX_GROWTH, grown


def sizes(running: Running) -> list[int]:
    return [resident_bytes(process) for process in (running.process.pid, *running.engines())]


async def load(
    running: Running,
    known: list[dict[str, Any]],
    expected: list[tuple[str, str]],
    seconds: float,
    rng: random.Random,
) -> int:
    """Many clients for some seconds; how many answers were compared."""
    end, num_right = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal num_right
        while time.monotonic() < end:
            index = rng.randrange(len(known))
            kind = rng.choice(["stream", "whole", "leave", "noise"])
            if kind == "stream":
                assert await streamed(http, running, known[index]) == expected[index]
            elif kind == "whole":
                choice = (await http.post(running.url + CHAT, json=known[index])).json()["choices"][0]
                assert (choice["message"]["content"], choice["finish_reason"]) == expected[index]
            elif kind == "leave":
                await leave(http, running, known[index] | {"max_tokens": 600})
            else:
                noise = known[index] | {"temperature": 1.5, "seed": index, "top_k": 40, "frequency_penalty": 0.5}
                assert (await http.post(running.url + CHAT, json=noise)).status_code == 200
            num_right += kind in ("stream", "whole")

    async with httpx.AsyncClient(timeout=60) as http, asyncio.TaskGroup() as clients:
        for _ in range(NUM_CLIENTS):
            clients.create_task(client())
    return num_right


async def streamed(http: httpx.AsyncClient, running: Running, ask: dict[str, Any]) -> tuple[str, str]:
    text, reason = "", ""
    async with http.stream("POST", running.url + CHAT, json=ask | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
    return text, reason


async def leave(http: httpx.AsyncClient, running: Running, ask: dict[str, Any]) -> None:
    async with http.stream("POST", running.url + CHAT, json=ask | {"stream": True}) as response:
        pieces = response.aiter_raw()
        await anext(pieces)
