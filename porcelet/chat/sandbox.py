"""A template's own process, seen from ours: started at the first rendering, killed when it takes too long.

A rendering costs a round trip over a socket (a few hundred microseconds), a start a tenth of a second. A process that
dies is replaced at the next rendering. It ends with its `Sandbox`, with our process, and at the latest by its timer.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from porcelet.errors import EngineError, InputError, ModelError

RENDER_SECONDS = 2.0
START_SECONDS = 60.0  # a cold disk, a busy machine: no template is running yet
MAX_CHARACTERS = 1 << 20  # of a template's source, and of what it writes
MAX_MEMORY = 512 << 20  # bytes of address space
MAX_REQUEST = 16 << 20  # bytes; every character of a longest text can take six
KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONUSERBASE",
    "LANG",
    "LC_ALL",
    "TZ",
)
REMEDY = "give the folder a working chat_template.jinja"


class Sandbox:
    """Renders one template. Threads may share it; they take turns."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_CHARACTERS:
            raise ModelError(f"the model's chat template has {len(source)} characters, more than 1 MiB; {REMEDY}")
        self._source = source
        self._lock = Lock()
        self._link: _Link | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The template's text with these variables, which must be JSON.

        Raises:
            InputError: the template refuses the conversation, or the text is longer than 1 MiB.
            ModelError: the template fails, takes more than 2 seconds or more memory than it is given.
        """
        body = json.dumps(values).encode()
        if len(body) > MAX_REQUEST:
            raise _too_long()
        with self._lock:
            reply = self._ask(body)
        if "text" in reply:
            return reply["text"]
        problem, message = reply["problem"], reply["message"]
        message = "".join(character if character.isprintable() else " " for character in message[:1000])
        if problem == "refused":
            raise InputError(f"messages: the model's chat template refuses them: {message}")
        if problem == "long":
            raise _too_long()
        raise ModelError(f"the model's chat template fails: {message}; {REMEDY}")

    def close(self) -> None:
        """End the process; the next rendering would start another."""
        with self._lock:
            self._stop()

    def _ask(self, body: bytes) -> dict[str, str]:
        for _ in range(2):  # a process that was found dead gets one successor
            link = self._link = self._link or _Link(self._source)
            try:
                return link.ask(body)
            except TimeoutError as problem:
                self._stop()
                raise ModelError(
                    f"the model's chat template took more than {RENDER_SECONDS:g} s and was stopped; {REMEDY}"
                ) from problem
            except (OSError, EOFError):
                self._stop()
            except BaseException:  # an interrupt between question and answer: the next answer would be this one's
                self._stop()
                raise
        raise ModelError(f"the model's chat template ended its process twice, out of memory perhaps; {REMEDY}")

    def _stop(self) -> None:
        if self._link is not None:
            self._link.stop()
            self._link = None


class _Link:
    """A running process and the socket to it."""

    def __init__(self, source: str) -> None:
        ours, theirs = socket.socketpair()
        limits = (1.5 * RENDER_SECONDS, MAX_MEMORY, MAX_CHARACTERS)
        # By path, not by name: the package around it would cost time and memory. -P: its folder provides no modules.
        command = [sys.executable, "-P", str(Path(__file__).with_name("child.py")), *map(str, limits)]
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                command, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL, process_group=0, env=_environment()
            )
        self._socket = ours
        self.stop = weakref.finalize(self, _stop, self.process, ours)
        try:
            self._receive(time.monotonic() + START_SECONDS)
            self._send(json.dumps(source).encode(), time.monotonic() + RENDER_SECONDS)
        except (OSError, EOFError) as problem:
            self.stop()
            raise EngineError(
                f"the process for chat templates does not start: {problem!r}; is jinja2 installed?"
            ) from problem

    def ask(self, body: bytes) -> dict[str, str]:
        deadline = time.monotonic() + RENDER_SECONDS
        self._send(body, deadline)
        reply = self._receive(deadline)
        assert isinstance(reply, dict), "the child answers with an object"
        return reply

    def _send(self, body: bytes, deadline: float) -> None:
        self._socket.settimeout(_until(deadline))
        self._socket.sendall(struct.pack("<I", len(body)) + body)

    def _receive(self, deadline: float) -> Any:
        (length,) = struct.unpack("<I", self._read(4, deadline))
        if length > MAX_REQUEST:
            raise EOFError(f"a frame of {length} bytes")
        return json.loads(self._read(length, deadline))

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._socket.settimeout(_until(deadline))
            part = self._socket.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError("the process ended")
            data += part
        return bytes(data)


def _environment() -> dict[str, str]:
    """What the interpreter needs to start; tokens and keys stay here."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def _until(deadline: float) -> float:
    """Seconds left; never zero, which would mean not to wait at all."""
    return max(deadline - time.monotonic(), 1e-6)


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _too_long() -> InputError:
    return InputError("messages: the chat template makes more than 1 MiB of text of them; shorten the conversation")
