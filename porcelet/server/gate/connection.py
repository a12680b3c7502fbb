"""uvicorn's HTTP/1.1 connection with what it lacks: a time by which a request's head must be there, a limit on
connections that is answered in our form, and that form for what is no HTTP.

A head that trickles in, a connection that says nothing, and a client that goes on sending a body whose answer it has
already got are each ended after `HEAD_SECONDS`. The body's own time is body.py's.

Left out: a time for TLS handshakes, which asyncio ends after a minute.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from porcelet.server.errors import INVALID, error_response
from porcelet.server.gate.guard import SECURITY_HEADERS

MAX_CONNECTIONS = 800  # below the 1024 files that a process may usually open
HEAD_SECONDS = 10.0


class Connection(H11Protocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._end(503, "too many connections are open; come back in a moment", "capacity_error")
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        problem = sys.exc_info()[1]
        hint = problem.error_status_hint if isinstance(problem, h11.RemoteProtocolError) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer before has begun: it is broken off
            self.transport.close()
        elif hint == 431:
            self._end(431, "the headers are too long, or came too slowly")
        else:
            self._end(400, "this is no HTTP request")

    def _await_head(self) -> None:
        """Watch the clock while all that can come is a head, or the rest of a body that nobody reads."""
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_waiting()
        elif self._ending is None:
            self._ending = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _end(self, status: int, message: str, kind: str = INVALID) -> None:
        response = error_response(status, message, kind)
        response.headers.update(SECURITY_HEADERS | {"Connection": "close"})
        head = h11.Response(status_code=status, headers=response.raw_headers)
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
