"""Answers only under the names it is meant to have, which stops DNS rebinding."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InvalidRequest
from .refuse import refuse


class TrustedHost:
    """`hosts`: names, `*.example.com` for all below; none allows any. Probes name an address: they pass."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self._names = {host.lower() for host in hosts if not host.startswith("*.")}
        self._below = tuple(host.lower().removeprefix("*") for host in hosts if host.startswith("*."))
        self._any = not hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._any or scope["type"] == "lifespan" or self._trusted(scope):
            await self.app(scope, receive, send)
        else:
            message = (
                "This server does not go by that name: the setting security.trusted_hosts lists its names."
            )
            await refuse(InvalidRequest(message, code="untrusted_host"), scope, send)

    def _trusted(self, scope: Scope) -> bool:
        if scope["path"] == "/health" or scope["path"].startswith("/health/"):
            return True
        given = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:  # two would be taken for either by what stands in between
            return False
        (host,) = given
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return name in self._names or name.endswith(self._below or ("\0",))
