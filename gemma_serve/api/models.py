"""`/v1/models`: what there is, and for operators which of it runs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ..models import Models
from .body import read_body
from .docs import errors, request_schema
from .schemas import AdapterBody, Model, ModelList

Wait = Annotated[bool, Query(description="Answer when it is done, or has failed; else at once, with 202.")]
Level = Annotated[
    int, Query(ge=1, le=2, description="1 keeps the weights in the machine's memory, 2 drops them.")
]
_CHANGES: dict[int | str, Any] = {
    202: {"model": Model, "description": "It has begun; `GET /v1/models/{model}` shows how it goes."},
    **errors(404, 409, 500, 501, 503),
}


def router(models: Models, max_json_depth: int) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", summary="List the models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models.list()}

    @routes.get("/v1/models/{model:path}", summary="One model", response_model=Model, responses=errors(404))
    async def get_model(model: str) -> dict[str, Any]:
        return models.get(model)

    async def outcome(model: str, change: asyncio.Task[None] | None, wait: bool) -> Response:
        if change is not None and wait:
            await asyncio.shield(change)  # it goes on when the client leaves
        status = 200 if change is None or wait else 202
        return Response(orjson.dumps(models.get(model)), status, media_type="application/json")

    @routes.post(
        "/v1/models/{model:path}/load",
        summary="Run a model",
        response_model=Model,
        responses=_CHANGES,
    )
    async def load(model: str, wait: Wait = False) -> Response:
        """In place of the one that runs; should it not load, that one comes back. Needs an admin key."""
        return await outcome(model, models.changes.load(model), wait)

    @routes.post(
        "/v1/models/{model:path}/unload",
        summary="End a model",
        response_model=Model,
        responses=_CHANGES,
    )
    async def unload(model: str, wait: Wait = False) -> Response:
        """Its requests finish first. Needs an admin key."""
        return await outcome(model, models.changes.unload(model), wait)

    @routes.post(
        "/v1/models/{model:path}/sleep",
        summary="Free a model's GPU memory",
        response_model=Model,
        responses=_CHANGES,
    )
    async def sleep(model: str, level: Level = 1, wait: Wait = False) -> Response:
        """Its requests finish first. Needs `engine.enable_sleep_mode` and an admin key."""
        return await outcome(model, models.changes.sleep(model, level), wait)

    @routes.post(
        "/v1/models/{model:path}/wake",
        summary="Wake a model that sleeps",
        response_model=Model,
        responses=_CHANGES,
    )
    async def wake(model: str, wait: Wait = False) -> Response:
        """Needs an admin key."""
        return await outcome(model, models.changes.wake(model), wait)

    @routes.post(
        "/v1/models/{model:path}/adapters",
        summary="Load a LoRA adapter",
        response_model=Model,
        responses=errors(400, 404, 409, 501, 503),
        openapi_extra=request_schema(AdapterBody),
    )
    async def load_adapter(model: str, request: Request) -> dict[str, Any]:
        """It is served as a model of its own. Needs `engine.enable_lora` and an admin key."""
        adapter = await read_body(request, AdapterBody, max_json_depth)
        return await models.load_adapter(model, adapter.name, adapter.path)

    @routes.delete(
        "/v1/models/{model:path}/adapters/{name}",
        summary="Unload a LoRA adapter",
        status_code=204,
        responses=errors(404, 503),
    )
    async def unload_adapter(model: str, name: str) -> Response:
        """Needs an admin key."""
        await models.unload_adapter(model, name)
        return Response(status_code=204)

    return routes
