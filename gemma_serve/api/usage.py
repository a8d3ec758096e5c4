"""`GET /v1/usage` and `GET /admin/usage`: requests and tokens by day."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from ..clients import current_client
from ..rate_limit import RateLimiter
from .docs import errors
from .schemas import UsageList

Days = Annotated[int, Query(ge=1, le=31, description="How many days, today included (UTC).")]


def router(limiter: RateLimiter) -> APIRouter:
    routes = APIRouter(tags=["usage"])

    async def rows(days: int) -> list[dict[str, Any]]:
        return [
            row._asdict() for row in sorted(await limiter.usage(days), key=lambda row: (row[0], row[1] or ""))
        ]

    @routes.get("/v1/usage", summary="Your usage", response_model=UsageList, responses=errors(400, 503))
    async def usage(days: Days = 7) -> dict[str, Any]:
        """Requests and tokens of the key that asks, by day; without a key, of all who have none."""
        client = current_client.get()
        key = client.key if client is not None else None
        return {"object": "list", "data": [row for row in await rows(days) if row["key"] == key]}

    @routes.get(
        "/admin/usage",
        tags=["admin"],
        summary="Everyone's usage",
        response_model=UsageList,
        responses=errors(400, 503),
    )
    async def everyones_usage(days: Days = 7) -> dict[str, Any]:
        return {"object": "list", "data": await rows(days)}

    return routes
