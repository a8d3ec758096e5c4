"""`GET /metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response


def router(registry: CollectorRegistry) -> APIRouter:
    routes = APIRouter(tags=["health"])
    responses: dict[int | str, dict[str, object]] = {200: {"content": {"text/plain": {}}}}

    @routes.get("/metrics", summary="For Prometheus", response_class=Response, responses=responses)
    async def metrics() -> Response:
        """The server's metrics, vLLM's (`vllm:…`) and Python's, in Prometheus' text format."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes
