"""The trace of each HTTP request. Only there where traces are sent."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ..logs import RequestRecord, current_request
from ..tracing import Tracing, current_trace
from .request_log import PROBED


class RequestTraces:
    """Messages of a WebSocket have traces of their own; probes have none."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(PROBED):
            await self.app(scope, receive, send)
            return
        record = current_request.get() or RequestRecord("")
        trace = self._tracing.begin(record, scope["headers"])
        token = current_trace.set(trace)
        try:
            await self.app(scope, receive, send)
        finally:
            current_trace.reset(token)
            route = getattr(scope.get("route"), "path", None)
            method = scope["method"]
            trace.end(
                f"{method} {route}" if route else method,
                record,
                {"http.request.method": method, "http.route": route, "url.path": scope["path"]},
            )
