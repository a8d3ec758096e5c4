"""`GET /version`."""

from __future__ import annotations

from fastapi import APIRouter

from .. import __version__
from ..engine.installed import vllm_version
from .schemas import Version


def router() -> APIRouter:
    routes = APIRouter(tags=["health"])
    found = Version(version=vllm_version(), gemma_serve=__version__)

    @routes.get("/version", summary="Versions")
    async def version() -> Version:
        """`version` is vLLM's, as `vllm serve` answers."""
        return found

    return routes
