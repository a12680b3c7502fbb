"""Whether the server lives, whether it wants work, and its metrics.

/healthz is 200 while every engine serves or loads, and 503 as soon as one is down: restart what stays so. /readyz is
200 while every engine serves, and 503 while one loads or starts again, or the server is about to end: send others the
work. Both are open to everybody, so they name models and counts, and nothing of a request or of this machine.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from porcelet.errors import CapacityError
from porcelet.metrics import CONTENT_TYPE, Metrics
from porcelet.server.errors import problem_response
from porcelet.server.generation.models import Model, Models

RETRY_SECONDS = "1"


def routes(models: Models, metrics: Metrics) -> APIRouter:
    """The three routes."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> Response:
        if failure := models.failure:
            response = problem_response(failure, 503)
            if not isinstance(failure, CapacityError):  # down for good, as far as the server can tell
                response.headers["Retry-After"] = "60"
            return response
        return JSONResponse({"status": "ok", "models": {name: _counts(model) for name, model in models.all.items()}})

    @router.get("/readyz")
    async def readyz() -> Response:
        states = {name: _state(model) for name, model in models.all.items()}
        ready = not models.draining and all(state == {"status": "ready"} for state in states.values())
        status = "draining" if models.draining else "ready" if ready else "waiting"
        headers = {} if ready else {"Retry-After": RETRY_SECONDS}
        return JSONResponse({"status": status, "models": states}, 200 if ready else 503, headers)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def text() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


def _counts(model: Model) -> dict[str, float]:
    return {name: model.engine.stats.get(name, 0) for name in ("num_running", "num_waiting")}


def _state(model: Model) -> dict[str, Any]:
    if failure := model.engine.failure:
        return {"status": "restarting" if isinstance(failure, CapacityError) else "down"}
    if model.progress is None:
        return {"status": "ready"}
    done, total = model.progress
    return {"status": "loading", "done": done, "total": total}
