"""Logging in with an API key: a browser changes it for a cookie that scripts cannot read.

The cookie is 32 random bytes, of which the database keeps the SHA-256, as of keys. It ends after 30 days, with its key,
or when its owner logs out. Wrong keys are counted per address, and too many are told to wait: that keeps guessing,
which is hopeless anyway, from costing us much. A right key always gets in: behind a proxy all share one address.

The cookie begins with its key's id. So the logins of that key alone are read, at most once a second, and no flood of
invented cookies reaches the database.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Column, Connection, Float, LargeBinary, String, Table, delete, insert, select
from starlette.responses import FileResponse, Response

from porcelet.errors import InputError
from porcelet.server.gate.keys import NEWS, Key, Keys
from porcelet.server.gate.limits import RateLimitError, Window
from porcelet.server.gate.loopback import network_of
from porcelet.server.store import Database, metadata

COOKIE = "porcelet_login"
SECONDS = 30 * 86400.0
MAX_SESSIONS = 100  # of one key; the oldest makes place
MAX_FAILURES = 10  # a minute and address
MAX_ADDRESSES = 4096
PAGE = Path(__file__).parents[1] / "static" / "login.html"

_logins = Table(
    "logins",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("key", String, nullable=False, index=True),
    Column("expires", Float, nullable=False),
)


class KeyRefused(InputError):
    """Nobody gets in with this."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Logins:
    """Who is logged in."""

    def __init__(self, database: Database, keys: Keys) -> None:
        self._database = database
        self._keys = keys
        self._known: dict[str, _Known] = {}  # by keys that exist, MAX_SESSIONS each
        self._lock = asyncio.Lock()  # what was read before a change is not kept after it

    async def open(self, key: Key) -> tuple[str, float]:
        """A new cookie's value, and for how many seconds it is good."""
        value, now = f"{key.id}-{secrets.token_urlsafe(32)}", time.time()
        expires = min(now + SECONDS, key.expires or float("inf"))
        await self._change(key.id, lambda connection: _open(connection, _hash(value), key.id, expires))
        return value, expires - now

    async def find(self, value: str) -> Key | None:
        """The key with which the owner of this cookie logged in, while it is valid."""
        key = await self._keys.valid(_key_id(value))
        if key is None:
            self._known.pop(_key_id(value), None)
            return None
        expires = (await self._of(key.id)).get(_hash(value), 0.0)
        return key if time.time() < expires else None

    async def close(self, value: str) -> None:
        login = delete(_logins).where(_logins.c.hash == _hash(value))
        await self._change(_key_id(value), lambda connection: connection.execute(login))

    async def _of(self, key: str) -> dict[bytes, float]:
        """When each of a key's logins expires, by the cookie's hash."""
        async with self._lock:
            known = self._known.get(key)
            if known is None or time.monotonic() >= known.read + NEWS:
                rows = select(_logins.c.hash, _logins.c.expires).where(_logins.c.key == key)
                found = await self._database.read(lambda connection: connection.execute(rows).all())
                known = self._known[key] = _Known(time.monotonic(), {row.hash: row.expires for row in found})
            return known.expires

    async def _change(self, key: str, work: Callable[[Connection], object]) -> None:
        async with self._lock:
            await self._database.run(work)
            self._known.pop(key, None)


@dataclass(frozen=True)
class _Known:
    """One key's logins as they were `read` at that monotonic time."""

    read: float
    expires: dict[bytes, float]


def _key_id(cookie: str) -> str:
    return cookie.partition("-")[0]


def routes(logins: Logins, keys: Keys) -> APIRouter:
    """/login and /logout."""
    router = APIRouter(include_in_schema=False)
    failures = Failures()

    @router.get("/login")
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    @router.post("/login", status_code=204)
    async def login(request: Request, body: LoginRequest) -> Response:
        key = await keys.find(body.key.strip())
        if key is None:
            address = request.client.host if request.client else ""
            failures.check(address)
            failures.add(address)
            raise KeyRefused("this API key is not known here, revoked or expired; check that it was copied whole")
        value, seconds = await logins.open(key)
        response = Response(status_code=204)
        response.set_cookie(
            COOKIE, value, max_age=int(seconds), path="/", secure=_is_secure(request), httponly=True, samesite="strict"
        )
        return response

    @router.post("/logout", status_code=204)
    async def logout(request: Request) -> Response:
        await logins.close(request.cookies.get(COOKIE, ""))
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path="/", secure=_is_secure(request), httponly=True, samesite="strict")
        return response

    return router


class LoginRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    key: str = Field(max_length=200)


class Failures:
    """Wrong keys in the last minute, by address. Of an IPv6 network, which is one customer's, all count as one."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, Window] = OrderedDict()

    def check(self, address: str) -> None:
        """
        Raises:
            RateLimitError: there were too many.
        """
        window, now = self._windows.get(network_of(address)), time.monotonic()
        if window and window.total(now) >= MAX_FAILURES:
            wait = window.wait(now, MAX_FAILURES - 1)
            raise RateLimitError(f"too many wrong keys came from your address; try again in {wait} s", wait)

    def add(self, address: str) -> None:
        network = network_of(address)
        self._windows.setdefault(network, Window()).add(time.monotonic(), 1)
        self._windows.move_to_end(network)
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)


def _is_secure(request: Request) -> bool:
    """Whether the browser speaks TLS, with us or with a proxy before us."""
    return request.scope["scheme"] == "https" or request.headers.get("origin", "").startswith("https:")


def _open(connection: Connection, hashed: bytes, key: str, expires: float) -> None:
    connection.execute(delete(_logins).where(_logins.c.expires <= time.time()))
    newest = select(_logins.c.hash).where(_logins.c.key == key).order_by(_logins.c.expires.desc())
    kept = newest.limit(MAX_SESSIONS - 1)
    connection.execute(delete(_logins).where(_logins.c.key == key, _logins.c.hash.not_in(kept)))
    connection.execute(insert(_logins).values(hash=hashed, key=key, expires=expires))


def _hash(value: str) -> bytes:
    return hashlib.sha256(value.encode("utf-8", "replace")).digest()
