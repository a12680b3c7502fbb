"""Messages between us and a reward's process: four bytes of length, then JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

MAX_FRAME = 64 << 20  # bytes


def send(connection: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Write a message before `deadline` (monotonic seconds), or raise TimeoutError."""
    body = json.dumps(message).encode()
    connection.settimeout(_until(deadline))
    connection.sendall(struct.pack("<I", len(body)) + body)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """The next message.

    Raises:
        TimeoutError: it is not there by `deadline`.
        EOFError: the other side is gone, or does not speak this.
    """
    (length,) = struct.unpack("<I", _read(connection, 4, deadline))
    if length > MAX_FRAME:
        raise EOFError(f"a frame of {length} bytes")
    return json.loads(_read(connection, length, deadline))


def _read(connection: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(_until(deadline))
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError("the process ended")
        data += part
    return bytes(data)


def _until(deadline: float | None) -> float | None:
    """Seconds left; never zero, which would mean not to wait at all."""
    return None if deadline is None else max(deadline - time.monotonic(), 1e-6)
