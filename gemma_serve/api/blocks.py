"""`GET /admin/blocks` and `DELETE /admin/blocks/{client}`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ..blocks import Blocks
from ..errors import NotFound
from .docs import errors
from .schemas import BlockList


def router(blocks: Blocks) -> APIRouter:
    routes = APIRouter(tags=["admin"], prefix="/admin")

    @routes.get("/blocks", summary="Who is blocked", response_model=BlockList, responses=errors(503))
    async def list_blocks() -> dict[str, Any]:
        """Addresses and keys that are refused for a while, the longest first."""
        rows = [
            block._asdict() | {"until": datetime.fromtimestamp(block.until, UTC)}
            for block in await blocks.list()
        ]
        return {"object": "list", "data": rows}

    @routes.delete(
        "/blocks/{client:path}", summary="Lift a block", status_code=204, responses=errors(404, 503)
    )
    async def lift(client: str) -> Response:
        """`client` as the list has it, such as `ip:192.0.2.1`."""
        if not await blocks.lift(client):
            raise NotFound(f"{client!r:.100} is not blocked.", param="client")
        return Response(status_code=204)

    return routes
