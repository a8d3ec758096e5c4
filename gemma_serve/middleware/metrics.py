"""Counts and times HTTP requests by method, route and status, and what is being served."""

from __future__ import annotations

import functools
import time

from prometheus_fastapi_instrumentator.routing import get_route_name
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ..logs import current_request
from ..metrics import CONNECTIONS, Metrics

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ROUTE = "none"


class RequestMetrics:
    """The instrumentator finds the route's template; its own middleware has no part in this.

    That one takes a client that left in the middle of an answer for a 200 and one that left before it for a
    500, where `RequestLog`, outside of this, knows; and it costs 100 µs a request, most of it for matching
    every route once more. Here a path without parameters is looked up.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._active = {kind: metrics.connections.labels(kind) for kind in CONNECTIONS}
        self._count = functools.lru_cache(maxsize=4096)(metrics.http_requests.labels)
        self._seconds = functools.lru_cache(maxsize=4096)(metrics.http_seconds.labels)
        self._templates: dict[str, str] = {}
        """Of the paths that are their route's template."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in self._active:
            await self.app(scope, receive, send)
            return
        active = self._active[kind]
        active.inc()
        started = time.perf_counter()
        try:
            await self.app(scope, receive, send)
        finally:
            active.dec()
            if kind == "http":
                self._observe(scope, time.perf_counter() - started)

    def _observe(self, scope: Scope, seconds: float) -> None:
        record = current_request.get()
        status = "500" if record is None else str(record.final_status)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        template = self._template(scope)
        self._count(method, template, status).inc()
        self._seconds(method, template).observe(seconds)

    def _template(self, scope: Scope) -> str:
        path: str = scope["path"]
        template = self._templates.get(path)
        if template is None:
            template = get_route_name(HTTPConnection(scope), should_include_root_path=False) or _NO_ROUTE
            if template == path:  # as many as there are routes: a client cannot make this grow
                self._templates[path] = template
        return template
