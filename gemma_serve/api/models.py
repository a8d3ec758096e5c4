"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..models import Models
from .docs import errors
from .schemas import Model, ModelList


def router(models: Models) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", summary="List the models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models.list()}

    @routes.get("/v1/models/{model:path}", summary="One model", response_model=Model, responses=errors(404))
    async def get_model(model: str) -> dict[str, Any]:
        return models.get(model)

    return routes
