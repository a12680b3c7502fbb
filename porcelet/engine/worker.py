"""The engine in a process of its own: `python -m porcelet.engine.worker --fd N --model PATH [key=value ...]`.

The server's process starts it (client.py) and hands it one end of a socket pair. The loop takes all messages that have
arrived, runs one step, sends one frame; without work it asserts that every cache page is back, then sleeps on the
queue. A thread reads the socket, so that the parent's end is noticed at once, in the middle of a load too. Ctrl-C is
the parent's business.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from porcelet.config import EngineConfig, override, parse_settings
from porcelet.engine.engine import Engine
from porcelet.engine.messages import (
    MAX_IN_FLIGHT,
    Abort,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    Refused,
    Submit,
    ToEngine,
    pack,
    read_body,
    to_engine,
    unpack,
)
from porcelet.errors import CapacityError, EngineError, PorceletError
from porcelet.kernels import cpu
from porcelet.kernels.linear import KINDS, FP8Operand, FP8Weight
from porcelet.models.layers import Linear
from porcelet.types import Output, Progress, Request

REPORT_SECONDS = 0.1
# By the kind of weight; the first that a model has is its name.
FORMAT_NAMES = {**{kind: f"int{kind.bits}" for kind in KINDS}, FP8Weight: "fp8", FP8Operand: "fp8"}


@dataclass(frozen=True)
class Compiled:
    """A request whose constraint has been compiled beside the steps, or why it could not be."""

    request: Request
    problem: PorceletError | None = None


Inbox = queue.SimpleQueue[ToEngine | Compiled | EngineError]


def main(arguments: list[str]) -> int:
    """Load, serve until the parent hangs up; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = _parse(arguments)
    connection = socket.socket(fileno=options.fd)
    connection.set_inheritable(False)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        config = override(EngineConfig(), parse_settings(options.settings), "engine setting")
        engine = Engine.load(options.model, config, _reporter(connection))
        _send(connection, _ready(engine))
        _serve(engine, connection, inbox)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the parent is gone, and with it everybody who could be told
    except Exception as problem:  # the process's border: whatever it was becomes a message and an exit code
        _send(connection, _last_words(problem, options.model))
        return problem.exit_code if isinstance(problem, PorceletError) else EngineError.exit_code
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="porcelet.engine.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("settings", nargs="*")
    return parser.parse_args(arguments)


def _read(connection: socket.socket, inbox: Inbox) -> None:
    """Frames from the socket into the inbox. The process holds nothing worth saving, so the parent's end is its own."""
    stream = connection.makefile("rb")
    try:
        while (body := read_body(stream)) is not None:
            inbox.put(unpack(to_engine, body))
    except EngineError as problem:
        inbox.put(problem)
        return
    except ConnectionResetError:
        pass
    os._exit(0)


def _serve(engine: Engine, connection: socket.socket, inbox: Inbox) -> None:
    desk = _Desk(engine, inbox)
    while True:
        for message in _arrived(inbox, wait=not engine.has_work):
            refused = desk.handle(message)
            if refused:
                _send(connection, refused)
        if engine.has_work:
            _send_outputs(engine, connection, engine.step())
            if not engine.has_work:
                engine.check_idle()


def _arrived(inbox: Inbox, *, wait: bool) -> Iterator[ToEngine | Compiled]:
    """All messages that are there; at least one if `wait`."""
    while wait or not inbox.empty():
        message = inbox.get()
        if isinstance(message, EngineError):
            raise message
        yield message
        wait = False


class _Uncompiled:
    """Requests whose constraints nobody has begun to compile, for two threads. Tenants take turns, so that one with
    many does not keep the others waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: dict[str, dict[str, Request]] = {}  # whose turn it is first; requests by id

    def put(self, request: Request) -> None:
        with self._lock:
            self._tenants.setdefault(request.tenant, {})[request.id] = request

    def take(self) -> Request | None:
        """The next one; None if all have been taken or removed."""
        with self._lock:
            if not self._tenants:
                return None
            tenant = next(iter(self._tenants))
            requests = self._tenants.pop(tenant)
            request = requests.pop(next(iter(requests)))
            if requests:
                self._tenants[tenant] = requests
            return request

    def remove(self, request_id: str) -> None:
        """Nobody wants it any more."""
        with self._lock:
            for tenant, requests in self._tenants.items():
                if requests.pop(request_id, None):
                    if not requests:
                        del self._tenants[tenant]
                    return


class _Desk:
    """Takes requests in. A new constraint takes tenths of a second to compile: a thread does it while steps go on."""

    def __init__(self, engine: Engine, inbox: Inbox) -> None:
        self._engine, self._inbox = engine, inbox
        self._compiling: set[str] = set()  # those that wait for it, too
        self._uncompiled = _Uncompiled()
        self._thread = ThreadPoolExecutor(1)

    @property
    def _is_full(self) -> bool:
        """Whether more wait than a client of ours would ever send."""
        return len(self._engine.scheduler.waiting) + len(self._compiling) >= MAX_IN_FLIGHT

    def handle(self, message: ToEngine | Compiled) -> Refused | None:
        match message:
            case Submit(request) if self._is_full:
                problem = CapacityError(f"{MAX_IN_FLIGHT} requests are waiting; try again when some have ended")
                return Refused(request.id, problem.kind, str(problem))
            case Submit(request) if request.params.constraint:
                self._compiling.add(request.id)
                self._uncompiled.put(request)
                self._thread.submit(self._compile_next)
            case Submit(request):
                return self._submit(request)
            case Compiled(request, problem) if request.id in self._compiling:  # else it was aborted meanwhile
                self._compiling.remove(request.id)
                return Refused(request.id, problem.kind, str(problem)) if problem else self._submit(request)
            case Abort(request_id):
                if request_id in self._compiling:
                    self._compiling.remove(request_id)
                    self._uncompiled.remove(request_id)
                self._engine.abort(request_id)
        return None

    def _submit(self, request: Request) -> Refused | None:
        try:
            self._engine.submit(request)
        except PorceletError as problem:
            return Refused(request.id, problem.kind, str(problem))
        return None

    def _compile_next(self) -> None:
        request = self._uncompiled.take()
        if request is None:  # as many were aborted as are missing
            return
        try:
            self._engine.prepare(request)
            self._inbox.put(Compiled(request))
        except PorceletError as problem:
            self._inbox.put(Compiled(request, problem))
        except Exception as problem:
            self._inbox.put(Compiled(request, EngineError(f"the constraint could not be compiled: {problem!r}")))


def _reporter(connection: socket.socket) -> Progress:
    """Tells of the load's progress, a few times a second."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            _send(connection, Loading(done, total))

    return report


def _send(connection: socket.socket, message: FromEngine) -> None:
    connection.sendall(pack(message))


def _send_outputs(engine: Engine, connection: socket.socket, outputs: list[Output]) -> None:
    """All in one frame; if that is too long, one a frame, and a request whose output alone is too long ends by that."""
    try:
        _send(connection, Outputs(outputs, dict(engine.stats())))
    except CapacityError as problem:
        if len(outputs) > 1:
            for output in outputs:
                _send_outputs(engine, connection, [output])
            return
        engine.abort(outputs[0].request_id)
        _send(connection, Outputs([_failed(outputs[0], str(problem))], dict(engine.stats())))


def _failed(output: Output, error: str) -> Output:
    return Output(
        request_id=output.request_id, tokens=(), logprobs=(), index=output.index, finish_reason="error", error=error
    )


def _ready(engine: Engine) -> Ready:
    layers = (module for module in engine.model.modules() if isinstance(module, Linear))
    formats = {type(layer.weight) for layer in layers}
    weights = next((name for kind, name in FORMAT_NAMES.items() if kind in formats), "float32")
    return Ready(
        model=engine.model.config,
        weights=weights,
        max_length=engine.scheduler.max_length,
        predicted_bytes=engine.predicted_bytes,
        threads=torch.get_num_threads(),
        instructions=cpu.isa(),
        torch=str(torch.__version__),
        device=engine.device.type,
    )


def _last_words(problem: Exception, model: Path) -> Failed:
    """One line for a person; what is not meant for one leaves its traceback on standard error."""
    if isinstance(problem, PorceletError):
        return Failed(problem.kind, str(problem))
    if _is_lack_of_memory(problem):
        text = f"the engine of {model.name} ran out of memory; free some, or take a smaller cache (cache_tokens)"
        return Failed(CapacityError.kind, f"{text}, other weights (int8, int4) or a smaller model")
    traceback.print_exception(problem)
    first_line = str(problem).strip().partition("\n")[0]
    ours = "; this is porcelet's mistake: please report the traceback" if isinstance(problem, AssertionError) else ""
    return Failed(EngineError.kind, f"the engine of {model.name} failed: {type(problem).__name__}: {first_line}{ours}")


def _is_lack_of_memory(problem: Exception) -> bool:
    # torch has no class of its own for what the processor's allocator could not get.
    return isinstance(problem, MemoryError) or "can't allocate memory" in str(problem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
