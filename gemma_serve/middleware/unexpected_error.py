"""The last resort: what no handler caught becomes a logged 500, with the request's id."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ServeError
from .refuse import refuse

logger = logging.getLogger(__name__)


class UnexpectedError:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            if scope["type"] == "lifespan":
                raise
            logger.exception("A request failed unexpectedly")
            if not started:
                await refuse(ServeError("The server failed on this request; its log says why."), scope, send)
