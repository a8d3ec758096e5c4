"""Admits requests by their client's limits, and gives back what they held when they have ended."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..clients import current_client
from ..errors import ServeError
from ..logs import current_request
from ..rate_limit import RateLimiter, RequestsExceeded, current_lease
from .policy import Policy
from .refuse import refuse


class RateLimit:
    """One `finally` ends every lease: answered, failed, client gone, engine dead, shutting down."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter, policy: Policy) -> None:
        self.app = app
        self._limiter = limiter
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = current_client.get()
        if client is None or scope["type"] == "lifespan" or self._exempt(scope):
            await self.app(scope, receive, send)
            return
        try:
            lease = await self._limiter.admit(client)
        except RequestsExceeded as error:
            await refuse(error, scope, send, error.lease.headers())
            return
        except ServeError as error:
            await refuse(error, scope, send)
            return
        if scope["type"] == "websocket":
            # The handshake is a request; its messages are admitted one by one, so it holds nothing meanwhile.
            await lease.settle(0, 0)
            await self.app(scope, receive, send)
            return
        record = current_request.get()

        async def settle() -> None:
            if record is None:
                await lease.settle(None, None)
            else:
                await lease.settle(record.prompt_tokens, record.completion_tokens)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if headers := lease.headers():
                    message = {**message, "headers": [*message.get("headers", []), *headers]}
            elif not message.get("more_body", False):
                await settle()  # before the client knows, which may send its next request at once
            await send(message)

        token = current_lease.set(lease)
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            current_lease.reset(token)
            if lease.held:
                await settle()

    def _exempt(self, scope: Scope) -> bool:
        """An operator must get in when others have used up what there is."""
        return self._policy.is_exempt(scope) or self._policy.scope_needed(scope) == "admin"
