"""Engine processes that die, for real: who waited is told, and the next process serves."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import EngineConfig
from porcelet.engine.supervisor import Restarts, Supervisor
from porcelet.errors import CapacityError, EngineError, ModelError
from porcelet.types import Output, Request, SamplingParams
from tests.tiny_model import save_tiny_model

CONFIG = EngineConfig(threads=1)
ENDLESS = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
QUICK = Restarts(first_pause=0.01, max_starts=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def with_supervisor(folder: Path, restarts: Restarts, body: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    """Run `body` with a loaded engine; no process is left afterwards, whatever happened."""

    async def main() -> None:
        engine = Supervisor(folder, CONFIG, restarts)
        try:
            await engine.ready()
            await asyncio.wait_for(body(engine), 60)
        finally:
            engine.close()

    asyncio.run(main())
    assert workers() == []


def workers() -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "porcelet.engine.worker"], capture_output=True, text=True
    )
    return [int(line) for line in found.stdout.split()]


async def collect(engine: Supervisor, request: Request) -> list[Output]:
    return [output async for output in engine.submit(request)]


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_killed_in_the_middle_of_streams(folder: Path) -> None:
    """A killed process fails every request within a second, the queued ones too; the next one gives the same tokens."""

    async def body(engine: Supervisor) -> None:
        (before,) = await collect_all(engine, 1, SHORT)
        ends = [asyncio.create_task(collect(engine, request(f"dies-{i}", ENDLESS))) for i in range(100)]
        async with aclosing(engine.submit(request("streams", ENDLESS))) as stream:
            await anext(stream)
            (first,) = workers()
            killed = time.monotonic()
            os.kill(first, signal.SIGKILL)
            with pytest.raises(EngineError, match="killed by signal 9"):
                async for _ in stream:
                    pass
        problems = await asyncio.gather(*ends, return_exceptions=True)
        assert time.monotonic() - killed < 1
        assert all(isinstance(problem, EngineError) for problem in problems)

        with pytest.raises(CapacityError, match="signal 9.*starting again") as caught:
            await collect(engine, request("early", SHORT))
        assert caught.value.retry_after and not engine.alive
        await until(lambda: engine.alive)
        assert workers() != [first]
        assert await collect_all(engine, 1, SHORT) == [before]

    with_supervisor(folder, QUICK, body)


def request(name: str, params: SamplingParams) -> Request:
    return Request(id=name, prompt=(1, 2, 3), params=params)


async def collect_all(engine: Supervisor, count: int, params: SamplingParams) -> list[tuple[int, ...]]:
    answers = await asyncio.gather(*(collect(engine, request(f"short-{i}", params)) for i in range(count)))
    return [tuple(token for output in outputs for token in output.tokens) for outputs in answers]


def test_gives_up_on_a_process_that_keeps_dying(folder: Path) -> None:
    """A process that dies again and again is started only so often; then the reason stays, and no process."""

    async def body(engine: Supervisor) -> None:
        while not isinstance(engine.failure, EngineError):
            for process in workers():
                os.kill(process, signal.SIGKILL)
            await asyncio.sleep(0.01)
        assert "3 times in a row" in str(engine.failure) and "signal 9" in str(engine.failure)
        with pytest.raises(EngineError, match="start the server again"):
            await collect(engine, request("late", SHORT))
        await asyncio.sleep(0.1)
        assert workers() == []

    with_supervisor(folder, QUICK, body)


def test_a_model_that_is_gone_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    """What another start cannot heal ends the restarts at once; requests hear the model's own reason as a 5xx."""
    model = shutil.copytree(folder, tmp_path / "model")

    async def body(engine: Supervisor) -> None:
        (model / "config.json").rename(model / "away.json")
        engine.client.process.kill()
        await until(lambda: isinstance(engine.failure, EngineError))
        with pytest.raises(EngineError, match="config.json.*start the server again"):
            await collect(engine, request("late", SHORT))

    with_supervisor(model, QUICK, body)


def test_another_model_in_its_place_is_refused(folder: Path, tmp_path: Path) -> None:
    """A restart serves the model that was served: requests are made with its tokenizer and limits."""
    model = shutil.copytree(folder, tmp_path / "model")

    async def body(engine: Supervisor) -> None:
        config = model / "config.json"
        config.write_text(config.read_text().replace("100000", "99999"))
        engine.client.process.kill()
        await until(lambda: isinstance(engine.failure, EngineError))
        assert "no longer the model" in str(engine.failure)

    with_supervisor(model, QUICK, body)


def test_a_first_load_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    """The first start's error is the caller's."""

    async def main() -> None:
        engine = Supervisor(tmp_path / "missing", CONFIG, QUICK)
        with pytest.raises(ModelError, match="missing"):
            await engine.ready()
        assert isinstance(engine.failure, ModelError)
        engine.close()

    asyncio.run(main())
    assert workers() == []


@pytest.mark.parametrize("loading", [True, False])
def test_a_stopped_process_does_not_outlive_its_end(folder: Path, loading: bool) -> None:
    """A process that no longer reacts, while it loads or while it serves, is killed by the close."""

    async def main() -> None:
        engine = Supervisor(folder, CONFIG, QUICK)
        ready = asyncio.create_task(engine.ready())
        await (asyncio.sleep(0.3) if loading else ready)
        os.kill(engine.client.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        engine.close()
        assert time.monotonic() - started < 3
        await asyncio.gather(ready, return_exceptions=True)

    asyncio.run(main())
    assert workers() == []


def test_closed_while_it_starts_again(folder: Path) -> None:
    """A close in the pause or in the load of a restart leaves no process, and starts none."""

    async def body(engine: Supervisor) -> None:
        first = engine.client
        first.process.kill()
        await until(lambda: engine.client is not first)

    with_supervisor(folder, QUICK, body)
    time.sleep(0.1)
    assert workers() == []


def test_pauses_double_up_to_the_longest() -> None:
    """0.5, 1, 2, ... and never more than the longest."""
    assert [Restarts().pause(count) for count in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
