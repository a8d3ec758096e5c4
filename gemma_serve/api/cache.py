"""`DELETE /v1/cache`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from ..cache import ResponseCache
from ..models import Models
from .docs import errors
from .schemas import CacheCleared

Model = Annotated[str | None, Query(description="Only answers of this model, by name or alias.")]
Tenant = Annotated[
    str | None, Query(description="Only answers of this client: `key:alice`, `ip:192.0.2.1`, `shared`.")
]


def router(cache: ResponseCache | None, models: Models) -> APIRouter:
    routes = APIRouter(tags=["admin"])

    @routes.delete(
        "/v1/cache",
        summary="Forget cached answers",
        response_model=CacheCleared,
        responses=errors(400, 401, 403, 404, 503),
    )
    async def clear(model: Model = None, tenant: Tenant = None) -> CacheCleared:
        """Those of a model, a client, or all; also those being generated now. Needs an admin key."""
        served = None if model is None else models.resolve(model)
        return CacheCleared(deleted=0 if cache is None else await cache.clear(tenant=tenant, model=served))

    return routes
