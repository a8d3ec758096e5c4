"""CORS, with a refused preflight in the shape of all our errors."""

from __future__ import annotations

import orjson
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import InvalidRequest, PermissionDenied
from .refuse import refuse


class CORS(CORSMiddleware):
    """Starlette's middleware, and the same rule for WebSockets, to which browsers do not apply it: any page
    could open one to a server that its visitor reaches."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self._may_connect(Headers(scope=scope)):
            message = (
                "Pages of this origin may not connect: the setting security.allowed_origins lists who may."
            )
            await refuse(PermissionDenied(message, code="origin_not_allowed"), scope, send)
            return
        if not self.allow_origins and all(name != b"origin" for name, _ in scope.get("headers", ())):
            await self.app(scope, receive, send)  # where nobody may, only who asks is told
        else:
            await super().__call__(scope, receive, send)

    def _may_connect(self, headers: Headers) -> bool:
        """A page of this server, or of an allowed origin; programs send no origin."""
        origin = headers.get("origin")
        if origin is None or self.is_allowed_origin(origin):
            return True
        scheme, _, host = origin.lower().partition("://")
        # Behind a proxy that ends TLS the scheme here is not the page's.
        default = {"http": ":80", "https": ":443"}.get(scheme, "")
        return bool(host) and host.removesuffix(default) == headers.get("host", "").lower().removesuffix(
            default
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        error = InvalidRequest(f"{reason}: the setting security.allowed_origins lists who may call.")
        headers = {"Vary": "Origin"}
        return Response(orjson.dumps(error.body()), error.status, headers, "application/json")
