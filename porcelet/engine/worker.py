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
from pathlib import Path

from porcelet.config import EngineConfig, override, parse_settings
from porcelet.engine.engine import Engine
from porcelet.engine.messages import (
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
from porcelet.errors import EngineError, PorceletError
from porcelet.kernels.linear import FP8Weight, Int8Weight
from porcelet.models.layers import Linear
from porcelet.types import Progress

REPORT_SECONDS = 0.1
Inbox = queue.SimpleQueue[ToEngine | EngineError]


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
    while True:
        for message in _arrived(inbox, wait=not engine.has_work):
            refused = _handle(engine, message)
            if refused:
                _send(connection, refused)
        if engine.has_work:
            _send(connection, Outputs(engine.step(), dict(engine.stats())))
            if not engine.has_work:
                engine.check_idle()


def _arrived(inbox: Inbox, *, wait: bool) -> Iterator[ToEngine]:
    """All messages that are there; at least one if `wait`."""
    while wait or not inbox.empty():
        message = inbox.get()
        if isinstance(message, EngineError):
            raise message
        yield message
        wait = False


def _handle(engine: Engine, message: ToEngine) -> Refused | None:
    match message:
        case Submit(request):
            try:
                engine.submit(request)
            except PorceletError as problem:
                return Refused(request.id, problem.kind, str(problem))
        case Abort(request_id):
            engine.abort(request_id)
    return None


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


def _ready(engine: Engine) -> Ready:
    layers = (module for module in engine.model.modules() if isinstance(module, Linear))
    formats = {type(layer.weight) for layer in layers}
    weights = "int8" if Int8Weight in formats else "fp8" if FP8Weight in formats else "float32"
    return Ready(engine.model.config, weights, engine.scheduler.max_length)


def _last_words(problem: Exception, model: Path) -> Failed:
    """One line for a person; what is not meant for one leaves its traceback on standard error."""
    if isinstance(problem, PorceletError):
        return Failed(problem.kind, str(problem))
    traceback.print_exception(problem)
    first_line = str(problem).strip().partition("\n")[0]
    ours = "; this is porcelet's mistake: please report the traceback" if isinstance(problem, AssertionError) else ""
    return Failed(EngineError.kind, f"the engine of {model} failed: {type(problem).__name__}: {first_line}{ours}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
