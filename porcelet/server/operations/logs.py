"""What the server writes about itself on standard error: plain lines, or one JSON object a line.

Every request has an id: its own X-Request-Id where that is sane, else a new one. It goes back in the headers, and every
line that is written while the request is served carries it. An access line says who asked for what, how it ended and
how long it took; never a key, a prompt, an answer, a query or what in a path could be personal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from porcelet.errors import InputError
from porcelet.server.generation.watch import Caller, Job
from porcelet.types import Output

log = logging.getLogger(__name__)

FORMATS = ("plain", "json")
LEVELS = ("debug", "info", "warning", "error")
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
QUIET = ("/healthz", "/readyz", "/metrics", "/static", "/favicon.ico")  # asked for all the time
UNROUTED = "(none)"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

Answered = Callable[[str, str, int], None]  # method, route, status


@dataclass
class Entry:
    """A request, as long as it is served. Tokens of everything that is generated for it are added up."""

    id: str
    num_prompt_tokens: int = 0
    num_generated: int = 0


_entry: ContextVar[Entry | None] = ContextVar("entry", default=None)


def request_id() -> str:
    """The id of the request that is being served here; empty outside of one."""
    entry = _entry.get()
    return entry.id if entry else ""


# ---- the lines ------------------------------------------------------------------------------------------------------


def configure(form: str, level: str) -> None:
    """Let every logger of this process write to standard error in that form.

    Raises:
        InputError: an unknown form or level.
    """
    for name, value, known in (("log format", form, FORMATS), ("log level", level, LEVELS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore"):  # they tell of every request at INFO
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the request's id, `fields` that came with the record, and
    an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if id := request_id():
            line["request_id"] = id
        line |= record.__dict__.get("fields", {})
        if record.exc_info and record.exc_info[1]:
            line["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False, default=str)


# ---- the requests ---------------------------------------------------------------------------------------------------


class TokenCount:
    """A `Watch` that adds a generation's tokens to its request's access line."""

    def admit(self, job: Job) -> None:
        pass

    def progressed(self, job: Job, output: Output) -> None:
        pass

    def ended(self, job: Job, reason: str) -> None:
        if entry := _entry.get():
            entry.num_prompt_tokens += job.num_prompt_tokens
            entry.num_generated += sum(job.num_generated)


class RequestLog:
    """The outermost of the application: gives requests their ids, writes the access lines, tells `answered`."""

    def __init__(self, app: ASGIApp, answered: Answered) -> None:
        self.app = app
        self.answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        entry = Entry(given if SANE_ID.fullmatch(given) else f"req_{uuid4().hex}")
        start, status = time.perf_counter(), 500

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = entry.id  # OpenAI's name and Anthropic's
            await send(message)

        token = _entry.set(entry)
        try:
            await self.app(scope, receive, with_id)
        finally:
            self._tell(scope, status, time.perf_counter() - start, entry)
            _entry.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float, entry: Entry) -> None:
        method, route = scope["method"], route_of(scope)
        method = method if method in METHODS else "(other)"  # a label of a metric has few values
        self.answered(method, route, status)
        caller = scope.get("caller")
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "caller": caller.id if isinstance(caller, Caller) else None,
            "prompt_tokens": entry.num_prompt_tokens,
            "generated_tokens": entry.num_generated,
        }
        level = logging.DEBUG if route in QUIET and status < 400 else logging.INFO
        log.log(level, "%s %s %d in %.3f s", method, route, status, seconds, extra={"fields": fields})


def route_of(scope: Scope) -> str:
    """The pattern of the path that was asked for."""
    route, path = scope.get("route"), scope["path"]
    if route is not None:
        # A route does not know the prefix under which its router was included.
        starts = (start for start, character in enumerate(path) if character == "/")
        prefix = next((path[:start] for start in starts if route.path_regex.match(path[start:])), "")
        return f"{prefix}{route.path}"
    mounted = scope.get("root_path", "")
    return mounted if mounted and "endpoint" in scope else UNROUTED
