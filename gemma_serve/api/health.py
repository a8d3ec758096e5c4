"""`GET /health`, what is below it, and `/ping`."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from ..health import Health
from .request_route import RequestRoute
from .schemas import HealthSummary


def router(health: Health) -> APIRouter:
    routes = APIRouter(tags=["health"], route_class=RequestRoute)
    responses: dict[int | str, dict[str, object]] = {
        200: {"model": HealthSummary},
        503: {"model": HealthSummary},
    }
    bare: dict[int | str, dict[str, object]] = {503: {"description": "Not ready"}}

    @routes.get("/health", summary="Summary", responses=responses)
    @routes.get("/health/ready", summary="Would a request sent now be served?", responses=responses)
    async def ready(request: Request) -> Response:
        """503 with the reason while the model loads, drains or has failed."""
        return _readiness(health.ready(), orjson.dumps(health.summary()))

    @routes.head("/health", include_in_schema=False)
    @routes.head("/health/ready", include_in_schema=False)
    async def head_ready(request: Request) -> Response:
        """Some load balancers probe with HEAD."""
        return await ready(request)

    @routes.head("/health/live", include_in_schema=False)
    async def head_live(request: Request) -> Response:
        return await live(request)

    @routes.get("/health/live", summary="Is the process alive?", responses=responses)
    async def live(request: Request) -> Response:
        """503 only when a restart would help."""
        return _current(health.summary(), 200 if health.live() else 503)

    @routes.get("/health/status", summary="What runs here, and what has happened to it")
    async def status(request: Request) -> Response:
        return _current(health.status())

    @routes.get("/health/metrics", summary="How busy the server is")
    async def metrics(request: Request) -> Response:
        """Rates are over the last 10 and 60 seconds, percentiles over 5 minutes; /metrics has the totals."""
        return _current(health.metrics())

    @routes.get("/ping", summary="As /health/ready, without a body", response_class=Response, responses=bare)
    @routes.post("/ping", summary="As /health/ready, without a body", response_class=Response, responses=bare)
    async def ping(request: Request) -> Response:
        """What SageMaker asks, and `vllm serve` answers."""
        return _readiness(health.ready())

    return routes


def _readiness(ready: bool, body: bytes | None = None) -> Response:
    headers = {"Cache-Control": "no-store"} if ready else {"Cache-Control": "no-store", "Retry-After": "5"}
    return Response(body, 200 if ready else 503, headers, None if body is None else "application/json")


def _current(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, {"Cache-Control": "no-store"}, "application/json")
