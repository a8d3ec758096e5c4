"""Counts requests under way, and refuses new ones once the server is about to end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..drain import Drain
from ..errors import ShuttingDown
from .refuse import refuse

_ANSWERED_TO_THE_END = ("/health", "/metrics")  # probes and scrapers ask how it goes on


class DrainRequests:
    """While the server drains, every answer asks its client to connect anew: elsewhere, behind a balancer."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith(_ANSWERED_TO_THE_END):
            await self.app(scope, receive, send)
            return
        if self._drain.refusing:
            await _refuse(scope, send)
            return
        if scope["type"] == "websocket":  # each of its messages is a request
            await self.app(scope, receive, send)
            return

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.begun:
                headers = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        self._drain.enter()
        try:
            await self.app(scope, receive, send_closing)
        finally:
            self._drain.leave()


async def _refuse(scope: Scope, send: Send) -> None:
    error = ShuttingDown("The server is shutting down. Try again: another may take its place.", retry_after=1)
    await refuse(error, scope, send, [(b"connection", b"close")])
