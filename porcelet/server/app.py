"""The HTTP application: the dialects' routes, the chat page, operations, and what stands in front of them all."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse

from porcelet.metrics import Metrics
from porcelet.server.conversations import api
from porcelet.server.conversations.jobs import Jobs
from porcelet.server.dialects import anthropic, openai, responses, tokenize
from porcelet.server.errors import ERRORS, install
from porcelet.server.gate import account, login
from porcelet.server.gate.guard import Gate, Guard
from porcelet.server.generation.models import Models
from porcelet.server.operations import health
from porcelet.server.operations.forecasts import Forecasts
from porcelet.server.operations.logs import RequestLog, TokenCount
from porcelet.server.operations.meters import Meters, engine_readings
from porcelet.server.store import Database

STATIC = Path(__file__).parent / "static"


def create_app(models: Models, database: Database, gate: Gate, jobs: Jobs) -> RequestLog:
    """The application over the served models, whose generations limits, metrics and log look on from now on."""
    metrics = Metrics()
    meters = Meters(metrics)
    forecasts = Forecasts()
    metrics.read(lambda: engine_readings(models, forecasts))
    models.watch(gate.limits, meters, TokenCount())
    app = FastAPI(
        title="porcelet",
        responses=ERRORS,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host of whoever asked
    )
    install(app)
    app.include_router(health.routes(models, metrics))
    for dialect in (openai, responses, anthropic, tokenize):
        app.include_router(dialect.routes(models))
    app.include_router(login.routes(gate.logins, gate.keys))
    app.include_router(account.routes(database, gate.keys, gate.limits))
    app.include_router(api.routes(models, database, jobs))
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/worker.js", include_in_schema=False)
    async def worker() -> FileResponse:
        # Not under /static: a service worker rules over its own folder only.
        return FileResponse(STATIC / "worker.js")

    # No middleware of FastAPI's: those are inside of what answers our own mistakes.
    return RequestLog(Guard(app, gate), meters.answered)
