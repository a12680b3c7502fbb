"""The real application behind its guard in one process, without models: for tests of who gets in."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from porcelet.config import ModelEntry, ServeConfig
from porcelet.server.app import create_app
from porcelet.server.conversations.jobs import Jobs
from porcelet.server.gate import keys
from porcelet.server.gate.access import Access
from porcelet.server.gate.connection import Connection
from porcelet.server.gate.guard import Gate, Guard, open_gate
from porcelet.server.gate.keys import Key, KeyLimits
from porcelet.server.gate.loopback import bind
from porcelet.server.generation.models import Models
from porcelet.server.operations.logs import RequestLog
from porcelet.server.store import Database

Result = TypeVar("Result")
OTHERS = Access(local=False)  # an address that other machines reach
HOST = "chat.example"


@dataclass(frozen=True)
class House:
    """The application, its database, and a client that comes from another machine."""

    app: RequestLog
    database: Database
    gate: Gate
    client: httpx.AsyncClient

    def key(
        self, name: str = "ada", limits: KeyLimits = keys.NO_LIMITS, expires: float | None = None
    ) -> tuple[Key, str]:
        """A new key, known at once."""
        made = self.database.run_now(lambda connection: keys.create(connection, name, limits, expires))
        self.forget()
        return made

    def forget(self) -> None:
        """Let the server read its keys again now, and not within a second."""
        self.gate.keys._read = float("-inf")


@asynccontextmanager
async def house(folder: Path, access: Access = OTHERS, host: str = HOST) -> AsyncIterator[House]:
    with closing(Database.open(f"sqlite:///{folder / 'porcelet.db'}")) as database:
        gate = open_gate(database, access, {})
        app = create_app(Models(ServeConfig(models={"tiny": ModelEntry("tiny")}), []), database, gate, Jobs(database))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            yield House(app, database, gate, client)


@asynccontextmanager
async def listening(app: ASGIApp, access: Access = OTHERS) -> AsyncIterator[tuple[str, int]]:
    """The application behind the real server's connections, on a free port of this machine."""
    listener = bind("127.0.0.1", 0)
    options = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        ssl_certfile=access.certificate,
        ssl_keyfile=access.private_key,
    )
    server = uvicorn.Server(options)
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        await serving


def in_house(
    folder: Path, visit: Callable[[House], Awaitable[Result]], access: Access = OTHERS, host: str = HOST
) -> Result:
    """What `visit` finds there."""

    async def main() -> Result:
        async with house(folder, access, host) as found:
            return await visit(found)

    return asyncio.run(main())


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def routes(house: House) -> Iterator[tuple[str, str]]:
    """Every method and path of the application."""
    guard = house.app.app
    assert isinstance(guard, Guard)
    app = guard.app
    assert isinstance(app, FastAPI)
    found = list(_flat(app.routes))
    assert len(found) > 8
    for prefix, route in found:
        if isinstance(route, Mount):
            yield "GET", f"{prefix}{route.path}/x"
        else:
            assert isinstance(route, Route | APIRoute), f"a new kind of route: {route!r}"
            for method in route.methods or ():
                yield method, prefix + re.sub(r"{[^}]*}", "x", route.path)


def _flat(found: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Routes, those of included routers too, which newer FastAPIs keep apart with the prefix that they were given."""
    for route in found:
        router = getattr(route, "original_router", None)
        if router is None:
            yield prefix, route
        else:
            yield from _flat(router.routes, prefix + route.include_context.prefix)
