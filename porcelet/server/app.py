"""The HTTP application: the dialects' routes, the chat page, health, and the guard in front of them all."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse, JSONResponse, Response

from porcelet.server import account, login, openai
from porcelet.server.errors import install, problem_response
from porcelet.server.guard import Gate, Guard
from porcelet.server.models import Models
from porcelet.server.store import Database

STATIC = Path(__file__).parent / "static"


def create_app(models: Models, database: Database, gate: Gate) -> Guard:
    """The application over the served models."""
    app = FastAPI(
        title="porcelet",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host of whoever asked
    )
    install(app)
    app.include_router(openai.routes(models))
    app.include_router(login.routes(gate.logins, gate.keys))
    app.include_router(account.routes(database, gate.keys))
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

    return Guard(app, gate)  # no middleware of it: those are inside of what answers our own mistakes
