"""Keeps an engine process running: when it dies, the next one is started. Imports no torch.

    engine = Supervisor(path, config)
    facts = await engine.ready()          # the first load's failure is the caller's; later ones are tried again
    async with aclosing(engine.submit(request)) as outputs: ...

`failure` is what a request would be answered with at this moment: None while the engine serves, a `CapacityError` that
says when to come back while it is starting again, and the reason once it is down for good. That is after a failure
that another start cannot heal (`ModelError`, `InputError`), or after `max_starts` in a row of which none served for
long. The pauses between them double. What was in flight when a process died is not run again: its reader may have seen
half of the answer already. What it tells callers names no paths of this machine; the log does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from porcelet.config import EngineConfig
from porcelet.engine.client import Arrived, EngineClient, ignored
from porcelet.engine.messages import Ready
from porcelet.errors import CapacityError, EngineError, InputError, ModelError, PorceletError
from porcelet.types import Output, Progress, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """How persistently a dead engine is started again; times in seconds.

    A pause lasts twice as long as the one before, from `first_pause` to `longest_pause`. A process that has served for
    `long_enough` makes the count of starts and the pauses begin anew.
    """

    first_pause: float = 0.5
    longest_pause: float = 30.0
    max_starts: int = 8
    long_enough: float = 60.0

    def pause(self, num_failures: int) -> float:
        """How long to wait after so many failures in a row."""
        return min(self.first_pause * 2.0 ** (num_failures - 1), self.longest_pause)


class Supervisor:
    """One engine process at a time; the first loads its model from now on. Use it from one event loop."""

    def __init__(self, path: Path, config: EngineConfig, restarts: Restarts = Restarts()) -> None:
        self.path = path
        self.config = config
        self.restarts = restarts
        self.client = EngineClient.start(path, config)
        self.num_restarts = 0
        self._watching: asyncio.Task[None] | None = None
        self._reason: PorceletError | None = None  # why it is being started again
        self._stopped: PorceletError | None = None  # why it is down for good
        self._load_seconds = 0.0
        self._back_at = 0.0
        self._serving_since = math.inf

    @property
    def alive(self) -> bool:
        return self.failure is None

    @property
    def failure(self) -> PorceletError | None:
        reason = self.client.failure or self._reason
        if self._stopped:
            return type(self._stopped)(_without_folders(str(self._stopped)))
        if not reason:
            return None
        seconds = max(1, math.ceil(self._back_at - time.monotonic()))
        why = _without_folders(str(reason))
        return CapacityError(f"{why}; the engine is starting again: come back in about {seconds} s", seconds)

    @property
    def stats(self) -> dict[str, int | float]:
        """The engine's gauges after its last step."""
        return self.client.stats

    async def ready(self, progress: Progress = lambda done, total: None) -> Ready:
        """Wait until the model is loaded, and watch over the process from then on; `progress` hears of the load.

        Raises:
            ModelError, InputError, CapacityError, EngineError: the process's own reason for not starting.
        """
        start = time.monotonic()
        try:
            facts = await self.client.ready(progress)
        except PorceletError as problem:
            self._stopped = problem
            raise
        self._serving_since = time.monotonic()
        self._load_seconds = self._serving_since - start
        self._watching = asyncio.create_task(self._watch(facts))
        return facts

    @property
    def pid(self) -> int:
        """The number of the process of this moment."""
        return self.client.process.pid

    def submit(self, request: Request, arrived: Arrived = ignored) -> AsyncGenerator[Output, None]:
        """Run a request, as `EngineClient.submit` does.

        Raises:
            CapacityError: the engine is starting again.
            PorceletError: why it is down for good.
        """
        if failure := self.failure:
            raise failure
        return self.client.submit(request, arrived)

    def close(self) -> None:
        """End the process, and wait for it."""
        self._stopped = self._stopped or EngineError("the engine was shut down")
        if self._watching:
            self._watching.cancel()
        self.client.close()

    async def _watch(self, facts: Ready) -> None:
        """Start the next process whenever one has ended, until that is in vain."""
        failure = await self.client.ended()
        num_failures = 0
        while True:
            served = time.monotonic() - self._serving_since
            num_failures = 1 if served > self.restarts.long_enough else num_failures + 1
            self._stopped = _final(failure, num_failures, self.restarts)
            if self._stopped:
                log.error("the engine is down: %s", self._stopped)
                return
            self._reason = failure
            await self._pause(self.restarts.pause(num_failures))
            failure = await self._run(facts)

    async def _pause(self, seconds: float) -> None:
        self._back_at = time.monotonic() + seconds + self._load_seconds
        log.warning("%s; the engine starts again in %g s", self._reason, seconds)
        await asyncio.sleep(seconds)

    async def _run(self, facts: Ready) -> PorceletError:
        """Start a process and let it serve; why it ended."""
        self._serving_since = math.inf
        self.num_restarts += 1
        try:
            self.client = EngineClient.start(self.path, self.config)
            new = await self.client.ready()
            if (new.model, new.weights) != (facts.model, facts.weights):  # the cache may have another size
                self.client.close()
                return ModelError(f"{self.path} is no longer the model that was served")
        except PorceletError as problem:
            return problem
        self._reason = None
        self._serving_since = time.monotonic()
        log.info("the engine serves again")
        return await self.client.ended()


def _without_folders(text: str) -> str:
    """A message with the last parts of its paths alone."""
    return re.sub(r"(?<![\w.])/(?:[^/\s:;,'\"]+/)*([^/\s:;,'\"]+)", r"\1", text)


def _final(failure: PorceletError, num_failures: int, restarts: Restarts) -> EngineError | None:
    """The error of an engine that another start cannot help; None if it may."""
    if isinstance(failure, ModelError | InputError):
        # The answer to somebody else's request: that it is the model's fault must not sound as if it were theirs.
        return EngineError(f"{failure}; once that is mended, start the server again")
    if num_failures > restarts.max_starts:
        return EngineError(f"{failure}; that was so {num_failures} times in a row, so start the server again")
    return None
