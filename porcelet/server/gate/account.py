"""What a key is told about itself."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Query, Request

from porcelet.server.gate import usage
from porcelet.server.gate.keys import Keys
from porcelet.server.gate.limits import Limits
from porcelet.server.generation.watch import caller_of
from porcelet.server.store import Database


def routes(database: Database, keys: Keys, limits: Limits) -> APIRouter:
    """GET /v1/usage: the caller's own key, by day and model."""
    router = APIRouter()

    @router.get("/v1/usage")
    async def own_usage(request: Request, num_days: int = Query(31, ge=1, le=366, alias="days")) -> dict[str, Any]:
        key = caller_of(request).key
        since = (datetime.now(UTC).date() - timedelta(days=num_days - 1)).isoformat()
        found = await database.run(lambda connection: usage.days(connection, key, since))
        return {
            "object": "list",
            "data": [{"date": day.date, "model": day.model, **asdict(day.amounts)} for day in found],
            "limits": asdict(keys.limits(key)),
            "tokens_left": limits.tokens_left(key),
        }

    return router
