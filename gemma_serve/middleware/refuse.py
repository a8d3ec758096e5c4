"""How a middleware answers in place of the application: an error in the client's shape, HTTP or WebSocket."""

from __future__ import annotations

import orjson
from starlette.types import Scope, Send

from ..errors import ServeError

Headers = list[tuple[bytes, bytes]]


async def refuse(error: ServeError, scope: Scope, send: Send, extra: Headers | None = None) -> None:
    """A WebSocket is refused before it is accepted, with the same status and body where the server can."""
    anthropic = scope["path"].startswith("/v1/messages")
    body = orjson.dumps(error.anthropic_body() if anthropic else error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(extra or [])]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
