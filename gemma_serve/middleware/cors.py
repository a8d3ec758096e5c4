"""CORS, with a refused preflight in the shape of all our errors."""

from __future__ import annotations

import orjson
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import InvalidRequest


class CORS(CORSMiddleware):
    """Starlette's middleware; WebSockets pass, since browsers do not apply CORS to them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.allow_origins and all(name != b"origin" for name, _ in scope.get("headers", ())):
            await self.app(scope, receive, send)  # where nobody may, only who asks is told
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        error = InvalidRequest(f"{reason}: the setting security.allowed_origins lists who may call.")
        headers = {"Vary": "Origin"}
        return Response(orjson.dumps(error.body()), error.status, headers, "application/json")
