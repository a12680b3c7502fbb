"""The HTTP application: the dialects' routes, the chat page, health, and the guard in front of them all.

For now it serves this machine alone, without keys. What protects it is that other programs' web pages cannot reach
it: a `Host` that is not loopback (DNS rebinding) and an `Origin` that is not our own page are refused, and no CORS
header is sent.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from porcelet.server import anthropic, openai, responses, tokenize
from porcelet.server.errors import error_response, install, problem_response
from porcelet.server.loopback import is_loopback
from porcelet.server.models import Models
from porcelet.server.watch import LOCAL

STATIC = Path(__file__).parent / "static"
MAX_BODY_BYTES = 1 << 20
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(models: Models) -> Guard:
    """The application over the served models."""
    app = FastAPI(title="porcelet", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    install(app)
    for dialect in (openai, responses, anthropic, tokenize):
        app.include_router(dialect.routes(models))
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/healthz")
    async def health() -> Response:
        if models.failure:
            return problem_response(models.failure, 503)
        stats = {name: model.engine.stats for name, model in models.all.items()}
        return JSONResponse({"status": "ok", "models": stats})

    return Guard(app)  # no middleware of it: those are inside of what answers our own mistakes


class Guard:
    """Checks who asks and how much, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = _refusal(Headers(scope=scope))
        scope["caller"] = LOCAL
        await (refusal or self.app)(scope, _limited(receive), _secured(send))


def _refusal(headers: Headers) -> Response | None:
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback(name.removeprefix("[").removesuffix("]")):
        return error_response(403, f"Host {host!r} is not this machine; use http://127.0.0.1 or http://localhost")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return error_response(403, f"Origin {origin!r} is another site; pages of other sites may not use this server")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        return error_response(413, _TOO_LARGE)
    return None


_TOO_LARGE = f"the body is too large; at most {MAX_BODY_BYTES} bytes are accepted"


def _limited(receive: Receive) -> Receive:
    """Count a body that came without a length."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited


def _secured(send: Send) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("Cache-Control", "no-cache")
        await send(message)

    return secured
