"""Counts and times HTTP requests by method, route and status, and what is being served."""

from __future__ import annotations

from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..logs import current_request
from ..metrics import CONNECTIONS, Metrics

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMetrics(PrometheusInstrumentatorMiddleware):
    """The instrumentator finds the route's template ("none" where there is none) and times to the last byte.

    The status is what `RequestLog`, outside of this, has seen: the instrumentator takes a client that left in
    the middle of an answer for a 200, and one that left before it for a 500.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        super().__init__(app, instrumentations=[self._observe], should_group_status_codes=False)
        self._metrics = metrics
        self._active = {kind: metrics.connections.labels(kind) for kind in CONNECTIONS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in self._active:
            await self.app(scope, receive, send)
            return
        active = self._active[scope["type"]]
        active.inc()
        try:
            await super().__call__(scope, receive, send)
        finally:
            active.dec()

    def _observe(self, info: Info) -> None:
        record = current_request.get()
        status = info.modified_status if record is None else str(record.final_status)
        method = info.method if info.method in _METHODS else "other"
        self._metrics.http_requests.labels(method, info.modified_handler, status).inc()
        self._metrics.http_seconds.labels(method, info.modified_handler).observe(info.modified_duration)
