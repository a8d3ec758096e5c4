"""The request's id, and its line in the log when it has ended."""

from __future__ import annotations

import logging
import os
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..logs import RequestRecord, current_request, log_request

# What may stand in a header, a log line and a file name alike; anything else is replaced by an id of ours.
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._~:@/+=-]{1,128}")
_REFUSED = 403  # what a WebSocket's client gets when it is closed before it was accepted
_STARTS = {"http.response.start", "websocket.accept", "websocket.http.response.start"}
PROBED = ("/health", "/metrics", "/ping")  # asked every few seconds; at INFO they would drown the rest


class RequestLog:
    """Takes or makes `X-Request-Id`, returns it, and writes `POST /path - 192.0.2.1 - 200 - 1.234s`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        record = RequestRecord(_request_id(scope))
        token = current_request.set(record)
        accepted = False

        async def send_with_id(message: Message) -> None:
            nonlocal accepted
            if message["type"] in _STARTS:
                record.status, accepted = message.get("status", 101), True
                record.finished = message["type"] == "websocket.accept"  # it has no end that could be missed
                headers = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
                if record.cache is not None:
                    headers += _cache_headers(record)
                message = {**message, "headers": headers}
            elif message["type"] == "websocket.close":
                record.status, record.finished = (record.status if accepted else _REFUSED), True
            elif message["type"] in ("http.response.body", "websocket.http.response.body"):
                record.finished = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._log(scope, record, time.perf_counter() - started)
            current_request.reset(token)

    def _log(self, scope: Scope, record: RequestRecord, seconds: float) -> None:
        level = logging.DEBUG if scope["path"].startswith(PROBED) else logging.INFO
        client = (scope.get("client") or ("-",))[0]
        log_request(scope.get("method", "WEBSOCKET"), _printable(scope), client, record, seconds, level)


def _cache_headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-cache", str(record.cache).encode())]
    if record.cache_age is not None:
        headers.append((b"age", b"%d" % record.cache_age))
    return headers


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _ACCEPTABLE_ID.fullmatch(text) else os.urandom(16).hex()
    return os.urandom(16).hex()


def _printable(scope: Scope) -> str:
    """The path as it was sent, percent-encoded: decoded, it could forge a log line or drive a terminal."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return ascii(raw.decode("latin-1"))[1:-1][:500]
