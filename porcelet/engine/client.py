"""The other end of one engine process (worker.py): start it, submit requests, notice its death. Imports no torch.

    engine = EngineClient.start(path, config)     # returns at once, the model loads meanwhile
    facts = await engine.ready()
    async with aclosing(engine.submit(request)) as outputs:
        async for output in outputs: ...

An iterator that is closed early aborts its request. A reader that is slower than the engine gets larger outputs
rather than a longer queue, so what waits for one request is its tokens, bounded by its own n and max_tokens. When the
process dies, every request in flight raises, and `failure` says why from then on; supervisor.py starts the next one.

The end of the socket or the process's last words tell of a death, both within moments. There is no heartbeat: a step
may take minutes (a long prompt, weights that come from a slow disk), so none could tell it from a process that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from porcelet.config import EngineConfig
from porcelet.engine.messages import (
    HEADER_BYTES,
    MAX_IN_FLIGHT,
    Abort,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    Refused,
    Submit,
    body_length,
    error_of,
    from_engine,
    pack,
    unpack,
)
from porcelet.errors import CapacityError, EngineError, PorceletError
from porcelet.types import Output, Progress, Request, join_outputs

log = logging.getLogger(__name__)

MAX_PIECES = 256  # outputs of one sample that are kept apart for a reader that is slow
EXIT_SECONDS = 2.0
HUNG_UP_SECONDS = 0.5  # a process closes its socket by ending, and nobody who waits shall wait a second

Arrived = Callable[[Output], None]


def ignored(output: Output) -> None:
    """For those who only read."""


class EngineClient:
    """One engine process. Make it with `start`; use it from one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.failure: PorceletError | None = None
        self.stats: dict[str, int | float] = {}
        self._connection = connection
        self._failed = False  # and everybody was told
        self._inboxes: dict[str, _Inbox] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None

    @classmethod
    def start(cls, path: Path, config: EngineConfig) -> EngineClient:
        """Start the process; it loads the model while the caller goes on.

        Raises:
            CapacityError: the machine has no room for another process.
        """
        ours, theirs = socket.socketpair()
        settings = [f"{key}={value}" for key, value in dataclasses.asdict(config).items()]
        # -P: a folder that happens to be the current one must not provide modules.
        command = [sys.executable, "-P", "-m", "porcelet.engine.worker"]
        command += ["--fd", str(theirs.fileno()), "--model", str(path), *settings]
        try:
            with theirs:
                return cls(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL), ours)
        except OSError as problem:
            ours.close()
            raise CapacityError(f"the engine process cannot be started: {problem}; free some memory") from problem

    @property
    def alive(self) -> bool:
        return self.failure is None

    async def ready(self, progress: Progress = lambda done, total: None) -> Ready:
        """Wait until the model is loaded; `progress` hears of it.

        Raises:
            ModelError, InputError, EngineError: the process's own reason for not starting.
        """
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        try:
            while isinstance(message := await _receive(reader), Loading):
                progress(message.done, message.total)
            if not isinstance(message, Ready):
                raise _out_of_turn(message)
        except (EOFError, PorceletError) as problem:
            raise await self._end(problem) from None
        self._receiving = asyncio.create_task(self._receive_all(reader))
        return message

    async def ended(self) -> PorceletError:
        """Wait until the process is gone; why it ended."""
        assert self._receiving, "ready() comes first"
        await self._receiving
        assert self.failure
        return self.failure

    async def submit(self, request: Request, arrived: Arrived = ignored) -> AsyncGenerator[Output, None]:
        """Run a request; the last output of each of its n samples carries a finish reason. Close it (`aclosing`) to
        abort. `arrived` hears of every output at once, though the reader may be slow, or never take it.

        Raises:
            InputError: the engine refuses the request.
            CapacityError: too many requests are in flight.
            EngineError: the process failed.
        """
        inbox = self._open(request, arrived)
        try:
            while not inbox.finished:
                for output in await inbox.take():
                    if output.finish_reason == "error":
                        raise EngineError(output.error or "the engine failed on this request")
                    yield output
        finally:
            del self._inboxes[request.id]
            if not inbox.finished and self.alive:
                self._send(Abort(request.id))

    def close(self) -> None:
        """End the process and wait for it: hanging up is enough, unless it is stuck."""
        if self._receiving:
            self._receiving.cancel()
        with contextlib.suppress(OSError):  # it may be closed already, by the process's end
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._writer:
            self._writer.transport.abort()
        else:
            self._connection.close()
        self._fail(EngineError("the engine was shut down"))
        self._exit_code()

    def _open(self, request: Request, arrived: Arrived) -> _Inbox:
        assert request.id not in self._inboxes
        if self.failure:
            raise self.failure
        if len(self._inboxes) >= MAX_IN_FLIGHT:
            raise CapacityError(f"{MAX_IN_FLIGHT} requests are in flight already; try again when some have ended")
        self._send(Submit(request))
        inbox = _Inbox(request.params.n, arrived)
        self._inboxes[request.id] = inbox  # after what can fail; nothing arrives before the next await
        return inbox

    def _send(self, message: Submit | Abort) -> None:
        assert self._writer, "ready() comes first"
        self._writer.write(pack(message))

    async def _receive_all(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._deliver(await _receive(reader))
        except Exception as problem:  # our own mistake, too: whoever waits must not wait for ever
            await self._end(problem)

    def _deliver(self, message: FromEngine) -> None:
        match message:
            case Outputs(outputs, stats):
                self.stats = stats
                for output in outputs:
                    if inbox := self._inboxes.get(output.request_id):  # None: aborted meanwhile
                        inbox.put(output)
            case Refused(request_id, kind, text):
                if inbox := self._inboxes.get(request_id):
                    inbox.fail(error_of(kind, text))
            case _:
                raise _out_of_turn(message)

    async def _end(self, problem: Exception) -> PorceletError:
        """Tell every request why the process ends, and wait until it is gone; one that goes on is killed."""
        if isinstance(problem, PorceletError):
            self._fail(problem)
        elif not isinstance(problem, EOFError):
            log.error("the engine's messages cannot be read", exc_info=problem)
            self._fail(EngineError(f"the engine's messages cannot be read: {problem!r}"))
        seconds = EXIT_SECONDS if self._failed else HUNG_UP_SECONDS
        self.failure = self.failure or EngineError("the engine process hung up")  # at once, the exit code may take long
        code = await self._in_own_thread(lambda: self._exit_code(seconds))
        assert self._writer
        self._writer.transport.abort()
        return self._fail(_death(code))

    async def _in_own_thread(self, wait: Callable[[], int | None]) -> int | None:
        """The event loop's threads may all be busy, for long."""
        thread = ThreadPoolExecutor(1)
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, wait)
        finally:
            thread.shutdown(wait=False)

    def _exit_code(self, seconds: float = EXIT_SECONDS) -> int | None:
        """Wait for a process that is about to end; one that is stuck is killed and has no code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def _fail(self, failure: PorceletError) -> PorceletError:
        """Only the first reason counts: it is the one that led to the others."""
        if not self._failed:
            self._failed, self.failure = True, failure
            self.stats = {}
            for inbox in self._inboxes.values():
                inbox.fail(failure)
        assert self.failure
        return self.failure


class _Inbox:
    """What has arrived for one request and was not taken yet. It is finished when all that its n samples gave is
    taken."""

    def __init__(self, num_samples: int, arrived: Arrived = ignored) -> None:
        self._hear = arrived
        self._num_running = num_samples
        self._outputs: dict[int, list[Output]] = {}
        self._failure: PorceletError | None = None
        self._arrived = asyncio.Event()

    @property
    def finished(self) -> bool:
        return self._num_running == 0 and not self._outputs

    def put(self, output: Output) -> None:
        outputs = self._outputs.setdefault(output.index, [])
        outputs.append(output)
        if len(outputs) == MAX_PIECES:
            outputs[:] = [join_outputs(outputs)]
        self._num_running -= output.finish_reason is not None
        self._arrived.set()
        if output.finish_reason != "error":
            self._hear(output)

    def fail(self, failure: PorceletError) -> None:
        self._failure = failure
        self._arrived.set()

    async def take(self) -> list[Output]:
        """Everything since the last call, as one output of each sample; a failure comes after it."""
        await self._arrived.wait()
        if not self._outputs:
            assert self._failure
            self._num_running = 0
            raise self._failure
        samples, self._outputs = self._outputs, {}
        if not self._failure:
            self._arrived.clear()
        return [outputs[0] if len(outputs) == 1 else join_outputs(outputs) for outputs in samples.values()]


async def _receive(reader: asyncio.StreamReader) -> FromEngine:
    """The next message.

    Raises:
        EOFError: the process hung up.
        PorceletError: its last words.
        EngineError: it broke the protocol.
    """
    try:
        length = body_length(await reader.readexactly(HEADER_BYTES))
        message = unpack(from_engine, await reader.readexactly(length))
    except OSError as problem:  # a write that found it gone ends the reading, too
        raise EOFError from problem
    if isinstance(message, Failed):
        raise error_of(message.kind, message.message)
    return message


def _out_of_turn(message: FromEngine) -> EngineError:
    return EngineError(f"the engine said {type(message).__name__} out of turn")


def _death(code: int | None) -> EngineError:
    if code is None:
        return EngineError("the engine process hung up, but did not end, so it was killed")
    if code >= 0:
        return EngineError(f"the engine process ended with exit code {code}")
    reason = "; often the machine is out of memory" if -code == 9 else ""
    return EngineError(f"the engine process was killed by signal {-code}{reason}")
