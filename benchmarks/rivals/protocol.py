"""What a driver is, and the process around it: replays a list of requests in time and tells when each token came.

    python -m benchmarks.rivals.NAME '{"format": ..., ...}'        run by an environment that need not hold porcelet

The process answers in JSON lines on the standard output it was started with; whatever the engine prints goes to
standard error. The first line is {"versions": {...}}. Then each line on standard input is a run,

    {"requests": [{"id": "0", "prompt": [1, 2, 3], "max_tokens": 8, "arrival": 0.0}, ...], "limit": 60, "at_most": 4}

answered by {"seconds": ..., "peak_bytes": ..., "answers": {"0": {"begun": ..., "times": [...], "tokens": [...]}, ...}}.
`at_most` requests are in flight, or all that have arrived if it is null; `begun` is when one was submitted or arrived.
Times are seconds since the run's start, one a token; tokens that came together share theirs. What is not finished after
`limit` seconds is cancelled: the answers hold what came until then. Only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

CACHE_TOKENS = 32768  # what every engine's cache may hold: 64 requests of 500 tokens
MAX_SEQUENCES = 64
MAX_BATCH_TOKENS = 512
IDLE_SECONDS = 0.001


@dataclass(frozen=True)
class Asked:
    """One request: `arrival` in seconds after the run's start. Decoded greedily, end-of-sequence tokens ignored."""

    id: str
    prompt: Sequence[int]
    max_tokens: int
    arrival: float


@dataclass(frozen=True)
class Came:
    """Tokens of one request that came at `time`, of time.perf_counter."""

    id: str
    tokens: Sequence[int]
    time: float


class Driver(Protocol):
    """An engine. `versions` names the packages that compute. A step may take long, but not wait for nothing."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    def submit(self, request: Asked) -> None: ...

    def step(self, deadline: float) -> Iterable[Came]:
        """Compute, or wait a moment, and tell what came; an engine that cannot be cancelled ends by `deadline`."""

    def cancel(self, ids: Sequence[str]) -> None:
        """Forget these requests; nothing more of them may come."""


@dataclass
class Answer:
    begun: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def replay(driver: Driver, requests: Sequence[Asked], limit: float, at_most: int | None) -> dict[str, Any]:
    """One run; the protocol's answer without the memory."""
    start = time.perf_counter()
    answers = {request.id: Answer(request.arrival) for request in requests}
    waiting = deque(sorted(requests, key=lambda request: request.arrival))
    unfinished: dict[str, int] = {}
    while (waiting or unfinished) and time.perf_counter() - start < limit:
        while waiting and waiting[0].arrival <= (now := time.perf_counter() - start):
            if at_most is not None and len(unfinished) >= at_most:
                break
            request = waiting.popleft()
            if at_most is not None:
                answers[request.id].begun = now
            driver.submit(request)
            unfinished[request.id] = request.max_tokens
        if not unfinished:
            time.sleep(IDLE_SECONDS)
            continue
        for came in driver.step(start + limit):
            answer = answers[came.id]
            answer.tokens += came.tokens
            answer.times += [came.time - start] * len(came.tokens)
            if len(answer.tokens) >= unfinished[came.id]:
                del unfinished[came.id]
    seconds = time.perf_counter() - start
    driver.cancel(list(unfinished))
    return {"seconds": seconds, "answers": {id: vars(answer) for id, answer in answers.items()}}


def main(build: Callable[[Mapping[str, Any]], Driver]) -> None:
    """Build the driver from the first argument's options and serve runs until standard input ends."""
    channel = private_output()
    driver = build(json.loads(sys.argv[1]))
    tell(channel, {"versions": driver.versions})
    for line in sys.stdin:
        command = json.loads(line)
        requests = [Asked(**request) for request in command["requests"]]
        forget_peak()
        result = replay(driver, requests, command["limit"], command["at_most"])
        tell(channel, {**result, "peak_bytes": peak_bytes()})


def installed(*packages: str) -> dict[str, str]:
    """The versions of installed packages."""
    return {name: version(name) for name in packages}


def private_output() -> int:
    """The standard output as a file descriptor of our own; the engine's prints go to standard error from now on."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return channel


def tell(channel: int, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def forget_peak() -> None:
    """Let the peaks of this process and its children begin again at what they hold now."""
    for process in _family(os.getpid()):
        Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak resident memory of this process and its children together, since `forget_peak`."""
    return sum(_high_water(process) for process in _family(os.getpid()))


def _family(process: int) -> Iterator[int]:
    yield process
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            continue
        for child in children:
            yield from _family(int(child))


def _high_water(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
