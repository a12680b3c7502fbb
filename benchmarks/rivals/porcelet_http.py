"""porcelet through its server: `porcelet serve` and /v1/completions over the loopback address, or the same engine
process without the server, so that the difference is what HTTP and text cost.

Options: those of porcelet.py; way ("http", or "client": the engine's process through its socket alone). A stream says
with its usage how many tokens came, not which: each piece of text counts as one when it comes, and what is left as
come with the last. The memory told is the server's, its engine's and this small client's together.
"""

from __future__ import annotations

import asyncio
import atexit
import http.client
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import (
    CACHE_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_SEQUENCES,
    Asked,
    Came,
    Driver,
    installed,
    main,
)
from porcelet.config import EngineConfig
from porcelet.engine.client import EngineClient
from porcelet.types import Request, SamplingParams

HOST = "127.0.0.1"
START_SECONDS = 120.0
WAIT_SECONDS = 0.05
UNKNOWN = -1  # a token that is counted and not shown


class _Followed:
    """A driver whose answers arrive from other threads."""

    def __init__(self) -> None:
        self.versions = installed("porcelet", "torch")
        self.came: queue.SimpleQueue[Came | Exception] = queue.SimpleQueue()

    def step(self, deadline: float) -> Iterable[Came]:
        try:
            came = [self.came.get(timeout=WAIT_SECONDS)]
        except queue.Empty:
            return []
        while not self.came.empty():
            came.append(self.came.get())
        for one in came:
            if isinstance(one, Exception):
                raise one
        return [one for one in came if isinstance(one, Came)]


class Server(_Followed):
    """`porcelet serve`, asked as any client would."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.connections: dict[str, http.client.HTTPConnection] = {}
        self.home = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "porcelet", "serve", "--model", options["model"], "--port", "0"]
        for name, value in _settings(options).items():
            command += ["--set", f"{name}={value}"]
        environment = os.environ | {"XDG_DATA_HOME": self.home.name}
        log = Path(self.home.name) / "stderr"
        with log.open("w") as stderr:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, env=environment)
        atexit.register(self._end)
        self.port = self._wait_until_ready(log)
        self.model = json.loads(self._get("/v1/models"))["data"][0]["id"]

    def submit(self, request: Asked) -> None:
        connection = http.client.HTTPConnection(HOST, self.port)
        self.connections[request.id] = connection
        threading.Thread(target=self._follow, args=(connection, request), daemon=True).start()

    def cancel(self, ids: Sequence[str]) -> None:
        """A closed connection cancels its request."""
        for id in ids:
            stream = self.connections[id].sock
            if stream:
                with suppress(OSError):  # it has just ended
                    stream.shutdown(socket.SHUT_RDWR)
        while any(json.loads(self._get("/healthz"))["models"][self.model].values()):
            time.sleep(WAIT_SECONDS)
        self.connections.clear()
        self.came = queue.SimpleQueue()

    def _follow(self, connection: http.client.HTTPConnection, request: Asked) -> None:
        came = self.came
        try:
            for num_tokens in self._counts(connection, request):
                came.put(Came(request.id, [UNKNOWN] * num_tokens, time.perf_counter()))
        except (RuntimeError, OSError, http.client.HTTPException) as problem:
            came.put(problem)  # of a cancelled request nobody looks here any more

    def _counts(self, connection: http.client.HTTPConnection, request: Asked) -> Iterable[int]:
        """Tokens as they come."""
        body = {
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"the server answered {response.status}: {response.read()!r}")
        num_told = 0
        for line in response:
            chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if any(choice["text"] for choice in chunk.get("choices", [])) and num_told < request.max_tokens - 1:
                num_told += 1
                yield 1
            if usage := chunk.get("usage"):
                yield usage["completion_tokens"] - num_told

    def _wait_until_ready(self, log: Path) -> int:
        end = time.monotonic() + START_SECONDS
        while self.server.poll() is None and time.monotonic() < end:
            if found := re.search(rf"serving \S+ on http://{HOST}:(\d+) ", log.read_text()):
                return int(found[1])
            time.sleep(WAIT_SECONDS)
        raise RuntimeError(f"porcelet did not start (exit code {self.server.poll()}): {log.read_text()[-300:]}")

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port)
        connection.request("GET", path)
        return connection.getresponse().read()

    def _end(self) -> None:
        self.server.terminate()
        self.server.wait()


class Client(_Followed):
    """The engine's process through its own client, in a thread with an event loop."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = self._run(self._start(options)).result()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        atexit.register(self.client.process.terminate)

    def submit(self, request: Asked) -> None:
        self.loop.call_soon_threadsafe(self._submit, request)

    def cancel(self, ids: Sequence[str]) -> None:
        self._run(self._forget(ids)).result()
        self.came = queue.SimpleQueue()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _start(self, options: Mapping[str, Any]) -> EngineClient:
        client = EngineClient.start(Path(options["model"]), EngineConfig(**_settings(options)))
        await client.ready()
        return client

    def _submit(self, request: Asked) -> None:
        self.tasks[request.id] = self.loop.create_task(self._follow(request, self.came))

    async def _follow(self, asked: Asked, came: queue.SimpleQueue[Came | Exception]) -> None:
        params = SamplingParams(max_tokens=asked.max_tokens, temperature=0, ignore_eos=True)
        request = Request(id=asked.id, prompt=tuple(asked.prompt), params=params)
        try:
            async for output in self.client.submit(request):
                came.put(Came(asked.id, output.tokens, time.perf_counter()))
        except Exception as problem:
            came.put(problem)

    async def _forget(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.tasks[id].cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        self.tasks.clear()
        while self.client.stats.get("num_running") or self.client.stats.get("num_waiting"):
            await asyncio.sleep(WAIT_SECONDS)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "weights": options["format"],
        "cache_tokens": CACHE_TOKENS,
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "max_sequences": MAX_SEQUENCES,
        "threads": options["threads"],
        "speculation": options["speculation"],
    }


def build(options: Mapping[str, Any]) -> Driver:
    return {"http": Server, "client": Client}[options["way"]](options)


if __name__ == "__main__":
    main(build)
