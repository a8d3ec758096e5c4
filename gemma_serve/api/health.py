"""`GET /health`, what is below it, and `/ping`."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from ..health import Health
from .schemas import HealthSummary


def router(health: Health) -> APIRouter:
    routes = APIRouter(tags=["health"])
    responses: dict[int | str, dict[str, object]] = {
        200: {"model": HealthSummary},
        503: {"model": HealthSummary},
    }
    bare: dict[int | str, dict[str, object]] = {503: {"description": "Not ready"}}

    def readiness() -> tuple[int, dict[str, str]]:
        headers = {"Cache-Control": "no-store"}
        return (200, headers) if health.ready() else (503, headers | {"Retry-After": "5"})

    @routes.get("/health", summary="Summary", responses=responses)
    @routes.get("/health/ready", summary="Would a request sent now be served?", responses=responses)
    async def ready() -> JSONResponse:
        """503 with the reason while the model loads, drains or has failed."""
        status, headers = readiness()
        return JSONResponse(health.summary(), status, headers)

    @routes.head("/health", include_in_schema=False)
    @routes.head("/health/ready", include_in_schema=False)
    async def head_ready() -> JSONResponse:
        """Some load balancers probe with HEAD."""
        return await ready()

    @routes.head("/health/live", include_in_schema=False)
    async def head_live() -> JSONResponse:
        return await live()

    @routes.get("/health/live", summary="Is the process alive?", responses=responses)
    async def live() -> JSONResponse:
        """503 only when a restart would help."""
        return JSONResponse(health.summary(), 200 if health.live() else 503, {"Cache-Control": "no-store"})

    @routes.get("/health/status", summary="What runs here, and what has happened to it")
    async def status() -> Response:
        return _current(health.status())

    @routes.get("/health/metrics", summary="How busy the server is")
    async def metrics() -> Response:
        """Rates are over the last 10 and 60 seconds, percentiles over 5 minutes; /metrics has the totals."""
        return _current(health.metrics())

    @routes.get("/ping", summary="As /health/ready, without a body", response_class=Response, responses=bare)
    @routes.post("/ping", summary="As /health/ready, without a body", response_class=Response, responses=bare)
    async def ping() -> Response:
        """What SageMaker asks, and `vllm serve` answers."""
        status, headers = readiness()
        return Response(status_code=status, headers=headers)

    return routes


def _current(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), 200, {"Cache-Control": "no-store"}, "application/json")
