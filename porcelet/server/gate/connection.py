"""uvicorn's HTTP/1.1 connection with what it lacks: times by which a request's head must be there and an answer be
taken, limits on connections that are answered in our form, and that form for what is no HTTP.

A head that trickles in, a connection that says nothing, and a client that goes on sending a body whose answer it has
already got are each ended after `HEAD_SECONDS`. The body's own time is body.py's. A client that does not read is ended
after `STALL_SECONDS`: its answer holds a place that others wait for.

Where the places are taken, the oldest connection that waits for its next request makes room for a new one. Another
machine has a share of the places; this one, on which a proxy may stand for many, has them all.

Left out: a time for TLS handshakes, which asyncio ends after a minute.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from porcelet.server.errors import INVALID, error_response
from porcelet.server.gate.guard import SECURITY_HEADERS
from porcelet.server.gate.loopback import is_loopback, network_of

MAX_CONNECTIONS = 800  # below the 1024 files that a process may usually open
MAX_PER_ADDRESS = 100
HEAD_SECONDS = 10.0
STALL_SECONDS = 60.0


class Connection(H11Protocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ending: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self.network = ""
        self.last_used = 0.0  # when something last came or went, in the loop's seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.last_used = self.loop.time()
        address = self.client[0] if self.client else ""
        self.network = "" if is_loopback(address) else network_of(address)
        if self._has_place():
            self._await_head()
        else:
            self._end(503, "too many connections are open; come back in a moment", "capacity_error")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.last_used = self.loop.time()
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        self.last_used = self.loop.time()
        super().on_response_complete()
        self._await_close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_awaiting_reader()
        self._await_close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self._stop_awaiting_reader()

    def send_400_response(self, msg: str) -> None:
        problem = sys.exc_info()[1]
        hint = problem.error_status_hint if isinstance(problem, h11.RemoteProtocolError) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer before has begun: it is broken off
            self._close()
        elif hint == 431:
            self._end(431, "the headers are too long, or came too slowly")
        else:
            self._end(400, "this is no HTTP request")

    def _has_place(self) -> bool:
        """Whether there is room for this connection, if need be in the place of an idle one."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        same = [other for other in others if self.network and other.network == self.network]
        if len(same) >= MAX_PER_ADDRESS:
            return _end_oldest(same)
        return len(others) < MAX_CONNECTIONS or _end_oldest(others)

    @property
    def is_idle(self) -> bool:
        """Whether all was answered and taken, and nothing asked yet."""
        open_, left = not self.transport.is_closing(), self.transport.get_write_buffer_size()
        return open_ and self.conn.their_state is h11.IDLE and left == 0

    def _await_head(self) -> None:
        """Watch the clock while all that can come is a head, or the rest of a body that nobody reads."""
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_waiting()
        elif self._ending is None:
            self._ending = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop_waiting(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _close(self) -> None:
        self.transport.close()
        self._await_close()

    def _await_close(self) -> None:
        """What is closed ends only when the rest has been read."""
        if self.transport.is_closing():
            self._await_reader()

    def _await_reader(self) -> None:
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def _stop_awaiting_reader(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _end(self, status: int, message: str, kind: str = INVALID) -> None:
        response = error_response(status, message, kind)
        response.headers.update(SECURITY_HEADERS | {"Connection": "close"})
        head = h11.Response(status_code=status, headers=response.raw_headers)
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._close()


def _end_oldest(connections: Iterable[Connection]) -> bool:
    """End the one of them that has been idle for the longest time, if there is one."""
    oldest = min((each for each in connections if each.is_idle), key=lambda each: each.last_used, default=None)
    if oldest:
        oldest.transport.abort()
    return oldest is not None
