"""The guard in front of every route: who gets in, how much they may send, and what every answer says to a browser.

It stands outside of the whole application, so also of what answers our own mistakes. It decides on `scope["path"]`,
which is what the routes are matched with, and never on an address put together from headers.

Open to everybody are exactly /healthz, /readyz, /login and /static/*. For anything else, whether it exists or not, one
needs an API key or a login's cookie; only on loopback, unless keys are required there too, whoever sits at this machine
needs neither. What protects that one from other programs' pages: a `Host` that is not this machine (DNS rebinding) and
an `Origin` that is not our own page are refused, and no CORS header is ever sent. What a proxy has passed on comes from
somebody else, and is refused there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from porcelet.config import Alias
from porcelet.errors import CapacityError, PorceletError
from porcelet.server.errors import problem_response
from porcelet.server.gate.access import Access
from porcelet.server.gate.body import Refused, check_head, limited
from porcelet.server.gate.keys import PREFIX, Keys
from porcelet.server.gate.limits import Call, Limits, current_call
from porcelet.server.gate.login import COOKIE, KeyRefused, Logins
from porcelet.server.gate.loopback import is_loopback
from porcelet.server.generation.watch import LOCAL, Caller
from porcelet.server.store import Database

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login"})
OPEN_FOLDER = "/static/"
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HSTS = "max-age=31536000"
# Of two that differ, we would believe one and a proxy before us the other.
SINGLE_HEADERS = ("host", "origin", "authorization", "x-api-key", "content-encoding")
PROXY_HEADERS = ("forwarded", "via", "x-real-ip")  # and X-Forwarded-*


@dataclass(frozen=True)
class Gate:
    """What the guard knows: the rules, the keys, who is logged in, and what each key may use."""

    access: Access
    keys: Keys
    logins: Logins
    limits: Limits


def open_gate(database: Database, access: Access, aliases: Mapping[str, Alias]) -> Gate:
    """The gate over a database; its `limits` are a `Watch` for the models."""
    keys = Keys(database)
    return Gate(access, keys, Logins(database, keys), Limits(database, keys, aliases))


@dataclass(frozen=True)
class Visitor:
    """Who asks, and by what right: "key", "login", "local", or "open" where nobody is asked."""

    caller: Caller | None
    by: str


class Guard:
    """Lets requests in to `app`. `scope["caller"]` is then who asks, and `scope["login"]` whether by a cookie."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server speaks no other protocol"
        try:
            with _database_errors():
                visitor = await self._let_in(scope)
            receive = await limited(scope, receive)
        except PorceletError as problem:
            await _refusal(scope, problem)(scope, receive, _secured(scope, send, {}))
            return
        scope["login"] = visitor.by == "login"
        told = {}
        if visitor.caller:
            scope["caller"] = visitor.caller
            told = self.gate.limits.headers(visitor.caller)
        call = current_call.set(Call())
        try:
            await self.app(scope, receive, _secured(scope, send, told))
        finally:
            current_call.reset(call)

    async def _let_in(self, scope: Scope) -> Visitor:
        headers = Headers(scope=scope)
        check_head(scope)
        _check_single(headers)
        self._check_host(headers)
        if not self.gate.access.needs_key:
            _check_direct(headers)
        visitor = await self._visitor(scope["path"], headers)
        if visitor.by != "key" or self.gate.access.local:
            self._check_origin(scope["scheme"], headers)
        return visitor

    async def _visitor(self, path: str, headers: Headers) -> Visitor:
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return Visitor(None, "open")
        given = _given_key(headers)
        # Where none is needed, whatever clients must send as a key is none of ours; but ours must be good ones.
        if given and (self.gate.access.needs_key or given.startswith(PREFIX)):
            key = await self.gate.keys.find(given)
            if key is None:
                raise KeyRefused("this API key is not known here, revoked or expired")
            return Visitor(key.caller, "key")
        if cookie := cookie_parser(headers.get("cookie", "")).get(COOKIE):
            key = await self.gate.logins.find(cookie)
            if key:
                return Visitor(key.caller, "login")
        if self.gate.access.needs_key:
            raise KeyRefused(f"an API key is needed: send the header Authorization: Bearer {PREFIX}..., or open /login")
        return Visitor(LOCAL, "local")

    def _check_host(self, headers: Headers) -> None:
        access, name = self.gate.access, _host_name(headers)
        if is_loopback(name) or name in access.allowed_hosts or not (access.local or access.allowed_hosts):
            return
        remedy = "use http://127.0.0.1 or http://localhost, or allow the name with --allowed-host"
        raise Refused(403, f"Host {headers.get('host', '')!r} is not known here; {remedy}")

    def _check_origin(self, scheme: str, headers: Headers) -> None:
        origin, host = headers.get("origin"), headers.get("host", "").lower()
        own = [f"{scheme}://{host}"]
        if _host_name(headers) in self.gate.access.allowed_hosts:
            own.append(f"https://{host}")  # a proxy before us may speak TLS
        if origin is not None and origin not in own:
            raise Refused(403, f"Origin {origin!r} is another site; pages of other sites may not use this server")


@contextmanager
def _database_errors() -> Iterator[None]:
    """Whoever cannot be looked up does not get in, and hears of it in our form: nothing answers for the guard."""
    try:
        yield
    except SQLAlchemyError as problem:
        log.error("keys and logins cannot be read", exc_info=problem)
        raise CapacityError("keys cannot be read at the moment; the server's log says why", 5) from problem


def _host_name(headers: Headers) -> str:
    host = headers.get("host", "").lower()
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).removeprefix("[").removesuffix("]")


def _check_single(headers: Headers) -> None:
    for name in SINGLE_HEADERS:
        if len(headers.getlist(name)) > 1:
            raise Refused(400, f"the header {name} came more than once")


def _check_direct(headers: Headers) -> None:
    for name in headers:
        if name in PROXY_HEADERS or name.startswith("x-forwarded-"):
            remedy = "start it with --require-key to serve behind a proxy"
            raise Refused(403, f"the header {name} says that a proxy passed this on, but no key is asked for; {remedy}")


def _given_key(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def _refusal(scope: Scope, problem: PorceletError) -> Response:
    """The answer to who does not get in: a browser that asked for the page is sent to the login's."""
    if problem.status == 401 and scope["path"] == "/" and "text/html" in Headers(scope=scope).get("accept", ""):
        return RedirectResponse("/login", 303)
    response = problem_response(problem, problem.status, scope["path"])
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if problem.status == 408:
        response.headers["Connection"] = "close"
    return response


def _secured(scope: Scope, send: Send, more: dict[str, str]) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.update(more)
            if scope["scheme"] == "https":
                headers["Strict-Transport-Security"] = HSTS
            headers.setdefault("Cache-Control", "no-cache")
        await send(message)

    return secured
