"""Whoever leaves, at whatever moment, gives everything back: pages, places and counts are as before at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import EngineConfig, ModelEntry, ServeConfig
from porcelet.engine.supervisor import Supervisor
from porcelet.server.generation.models import Model
from porcelet.server.generation.watch import LOCAL
from porcelet.types import SamplingParams

ENGINE = EngineConfig(threads=1, max_sequences=4, max_batch_tokens=8, cache_tokens=8192, speculation="lookup")
ENDLESS = SamplingParams(max_tokens=5000, temperature=0, ignore_eos=True)
SAMPLES = SamplingParams(max_tokens=5000, temperature=1, ignore_eos=True, n=3, seed=1)
RANDOM = SamplingParams(max_tokens=5000, temperature=1, ignore_eos=True, seed=1)
Stats = dict[str, int | float]

# What is asked for, and how the engine's statistics show that the moment has come.
PHASES: dict[str, tuple[int, SamplingParams, Callable[[Stats, Stats], bool]]] = {
    "prompt": (2000, RANDOM, lambda was, now: now["num_free_pages"] < was["num_free_pages"] - 10),
    "answer": (5, RANDOM, lambda was, now: now["num_running"] > was["num_running"]),
    "samples": (5, SAMPLES, lambda was, now: now["num_running"] == was["num_running"] + 3),
    "guesses": (5, ENDLESS, lambda was, now: now["num_accepted"] > was["num_accepted"] + 10),
}


@pytest.fixture(scope="module")
def with_model(folder: Path) -> Callable[[Callable[[Model], Coroutine[Any, Any, None]]], None]:
    """Runs a test's body with a served model."""

    def run(body: Callable[[Model], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            engine = Supervisor(folder, ENGINE)
            config = ServeConfig(models={"tiny": ModelEntry("tiny", ENGINE)})
            try:
                model = Model("tiny", folder, engine, config)
                await model.load(lambda done, total: None)
                await asyncio.wait_for(body(model), 60)
            finally:
                engine.close()

        asyncio.run(main())

    return run


@asynccontextmanager
async def asked(model: Model, length: int, params: SamplingParams) -> AsyncIterator[None]:
    """A request that is under way, of a prompt that nobody else has; all that comes is read."""
    prompt = [(7 * i + length) % 250 for i in range(length)]

    async def read() -> None:
        async with aclosing(model.complete(prompt, params, LOCAL)) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def held(model: Model) -> tuple[int | float, ...]:
    stats = model.engine.stats
    return stats["num_running"], stats["num_waiting"], model.queue.num_running


def test_leaving_in_every_phase(with_model: Callable[..., None]) -> None:
    """In the prompt, in the answer, with several samples and in the middle of guesses: within a moment the engine has
    what it had; at last all pages are free."""

    async def body(model: Model) -> None:
        async with asked(model, 3, RANDOM):
            await until(lambda: model.engine.stats.get("num_running") == 1)
            for phase in PHASES:
                await leave(model, phase)
        await until(lambda: held(model) == (0, 0, 0), 1.0)
        assert model.engine.stats["num_free_pages"] == model.engine.stats["num_pages"]

    with_model(body)


async def leave(model: Model, phase: str) -> None:
    length, params, has_come = PHASES[phase]
    before, was = held(model), dict(model.engine.stats)
    async with asked(model, length, params):
        await until(lambda: has_come(was, model.engine.stats))
        assert held(model) != before
    await until(lambda: held(model) == before, 1.0)


def test_leaving_the_queue(with_model: Callable[..., None]) -> None:
    """Who waits behind a full engine leaves no trace, and those that run go on."""

    async def body(model: Model) -> None:
        async with AsyncExitStack() as stack:
            for length in range(3, 7):
                await stack.enter_async_context(asked(model, length, RANDOM))
            await until(lambda: model.engine.stats.get("num_running") == 4)
            before = held(model)
            async with asked(model, 50, RANDOM):
                await until(lambda: model.engine.stats["num_waiting"] == 1)
            await until(lambda: held(model) == before, 1.0)
        await until(lambda: held(model) == (0, 0, 0), 1.0)
        assert model.engine.stats["num_free_pages"] == model.engine.stats["num_pages"]

    with_model(body)
