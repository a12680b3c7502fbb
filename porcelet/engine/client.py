"""The server's end of the engine process (worker.py): start it, submit requests, notice its death. Imports no torch.

    engine = EngineClient.start(path, config)     # returns at once, the model loads meanwhile
    facts = await engine.ready()
    async with aclosing(engine.submit(request)) as outputs:
        async for output in outputs: ...

An iterator that is closed early aborts its request. A reader that is slower than the engine gets larger outputs
rather than a longer queue, so what waits for one request is bounded by its own max_tokens. When the process dies,
every request in flight raises, and `failure` says why from then on. Restarting is left to whoever runs the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from porcelet.config import EngineConfig
from porcelet.engine.messages import (
    HEADER_BYTES,
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

MAX_IN_FLIGHT = 1024
EXIT_SECONDS = 2.0


class EngineClient:
    """One engine process. Make it with `start`; use it from one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.failure: PorceletError | None = None
        self.stats: dict[str, int | float] = {}
        self._connection = connection
        self._inboxes: dict[str, _Inbox] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None

    @classmethod
    def start(cls, path: Path, config: EngineConfig) -> EngineClient:
        """Start the process; it loads the model while the caller goes on."""
        ours, theirs = socket.socketpair()
        settings = [f"{key}={value}" for key, value in dataclasses.asdict(config).items()]
        # -P: a folder that happens to be the current one must not provide modules.
        command = [sys.executable, "-P", "-m", "porcelet.engine.worker"]
        command += ["--fd", str(theirs.fileno()), "--model", str(path), *settings]
        with theirs:
            return cls(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL), ours)

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
        except EOFError:
            message = None
        if not isinstance(message, Ready):
            self.failure = await self._why_it_ended(message if isinstance(message, Failed) else None)
            raise self.failure
        self._receiving = asyncio.create_task(self._receive_all(reader))
        return message

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """Run a request; the last output carries a finish reason. Close it (`aclosing`) to abort.

        Raises:
            InputError: the engine refuses the request.
            CapacityError: too many requests are in flight.
            EngineError: the process failed.
        """
        inbox = self._open(request)
        try:
            while not inbox.finished:
                output = await inbox.take()
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

    def _open(self, request: Request) -> _Inbox:
        assert request.id not in self._inboxes
        if self.failure:
            raise self.failure
        if len(self._inboxes) >= MAX_IN_FLIGHT:
            raise CapacityError(f"{MAX_IN_FLIGHT} requests are in flight already; try again when some have ended")
        self._send(Submit(request))
        inbox = self._inboxes[request.id] = _Inbox()  # after what can fail; nothing arrives before the next await
        return inbox

    def _send(self, message: Submit | Abort) -> None:
        assert self._writer, "ready() comes first"
        self._writer.write(pack(message))

    async def _receive_all(self, reader: asyncio.StreamReader) -> None:
        try:
            while not isinstance(message := await _receive(reader), Failed):
                self._deliver(message)
            failure = await self._why_it_ended(message)
        except EOFError:
            failure = await self._why_it_ended(None)
        except EngineError as problem:
            self.process.kill()
            failure = problem
        self._fail(failure)

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
                raise EngineError(f"the engine said {type(message).__name__} out of turn")

    async def _why_it_ended(self, failed: Failed | None) -> PorceletError:
        """The process's last words, or what its exit code tells."""
        code = await asyncio.to_thread(self._exit_code)
        if failed:
            return error_of(failed.kind, failed.message)
        if code < 0:
            reason = "; often the machine is out of memory" if -code == 9 else ""
            return EngineError(f"the engine process was killed by signal {-code}{reason}; start the server again")
        return EngineError(f"the engine process ended with exit code {code}; start the server again")

    def _exit_code(self) -> int:
        """Wait for a process that is about to end; one that is stuck is killed."""
        try:
            return self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _fail(self, failure: PorceletError) -> None:
        self.failure = self.failure or failure
        for inbox in self._inboxes.values():
            inbox.fail(self.failure)


class _Inbox:
    """What has arrived for one request and was not taken yet."""

    def __init__(self) -> None:
        self.finished = False
        self._outputs: list[Output] = []
        self._failure: PorceletError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        self._outputs.append(output)
        self._arrived.set()

    def fail(self, failure: PorceletError) -> None:
        self._failure = failure
        self._arrived.set()

    async def take(self) -> Output:
        """Everything since the last call, as one output."""
        await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        if not outputs:
            assert self._failure
            self.finished = True
            raise self._failure
        if self._failure:
            self._arrived.set()  # the next call raises
        self.finished = outputs[-1].finish_reason is not None
        return outputs[0] if len(outputs) == 1 else join_outputs(outputs)


async def _receive(reader: asyncio.StreamReader) -> FromEngine:
    """The next message.

    Raises:
        EOFError: the process hung up.
        EngineError: it broke the protocol.
    """
    try:
        length = body_length(await reader.readexactly(HEADER_BYTES))
        return unpack(from_engine, await reader.readexactly(length))
    except ConnectionResetError as problem:
        raise EOFError from problem
