"""Who sends the request: checks its key, or knows it by its address."""

from __future__ import annotations

import functools
import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from ..api_keys import ApiKeys
from ..blocks import Blocks
from ..clients import Client, Quotas, authenticate_again, current_client
from ..errors import PermissionDenied, ServeError, Unauthenticated
from ..logs import current_request
from .policy import Policy
from .refuse import refuse

# What browsers can send with a WebSocket, in OpenAI's spelling: https://platform.openai.com/docs/guides/realtime
_SUBPROTOCOL = "openai-insecure-api-key."
_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})
_LOCAL_NAMES = (b"localhost", b"127.0.0.1", b"[::1]")


class Authentication:
    """Sets `current_client`, or refuses with 401 or 403: whatever is not public needs a key, if any does."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, blocks: Blocks, policy: Policy, required: bool, quotas: Quotas
    ) -> None:
        self.app = app
        self._keys = keys
        self._blocks = blocks
        self._policy = policy
        self._required = required
        self._anonymous = functools.lru_cache(maxsize=4096)(functools.partial(_anonymous, quotas))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            sent = _sent_key(scope)
            client = await self._client(scope, sent)
        except ServeError as error:
            await refuse(error, scope, send)
            return
        if client.key is not None and (record := current_request.get()) is not None:
            record.key = client.key
        if scope["type"] == "websocket":  # in a task, and so a context, of its own
            authenticate_again.set(functools.partial(self._client, scope, sent))
        token = current_client.set(client)
        try:
            await self.app(scope, receive, send)
        finally:
            current_client.reset(token)

    async def _client(self, scope: Scope, sent: str | None) -> Client:
        """Raises `Unauthenticated`, `PermissionDenied`, `Blocked`."""
        anonymous = self._anonymous((scope.get("client") or ("unknown",))[0])
        if self._policy.is_public(scope):
            return anonymous
        needed = self._policy.scope_needed(scope)
        if needed == "admin" and not len(self._keys):
            if _is_local(scope):
                return anonymous
            raise PermissionDenied(
                "Without API keys, admin routes are only for this machine itself: set "
                "security.api_keys_file, with a key that has the scope 'admin'."
            )
        exempt = self._policy.is_exempt(scope)
        if not exempt:
            self._blocks.check(anonymous.id)
        elif sent is not None:  # or guessing could go on there
            self._blocks.check(anonymous.id, "authentication")
        if sent is None:
            if self._required or needed == "admin":
                raise Unauthenticated(
                    "You didn't provide an API key: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."
                )
            return anonymous
        try:
            client = self._keys.authenticate(sent)
        except Unauthenticated:
            if self._required or needed == "admin":
                await self._blocks.strike(anonymous.id, "authentication")
                raise
            return anonymous  # OpenAI's clients always send something
        if not exempt:
            self._blocks.check(client.id)
        if needed is not None and needed not in client.scopes:
            raise PermissionDenied(f"This API key lacks the scope {needed!r}.")
        return client


def _sent_key(scope: Scope) -> str | None:
    """The request's key. It is taken out of a WebSocket's subprotocols, of which the server repeats one."""
    sent = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            if kind.lower() == b"bearer" and (key := key.strip()):
                return str(key.decode("latin-1"))
        elif name == b"x-api-key" and value:
            sent = value.decode("latin-1")
    if scope["type"] == "websocket":
        offered = scope.get("subprotocols", [])
        for protocol in offered:
            if protocol.startswith(_SUBPROTOCOL):
                sent = sent or protocol.removeprefix(_SUBPROTOCOL) or None
        scope["subprotocols"] = [name for name in offered if not name.startswith(_SUBPROTOCOL)]
    return sent


def _anonymous(quotas: Quotas, host: str) -> Client:
    """A client without a key. One who has an IPv6 address has the 2^64 of its network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return Client(f"ip:{host:.64}", quotas=quotas)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        else:
            network = ipaddress.ip_network((address, 64), strict=False)
            return Client(f"ip:{network}", quotas=quotas)
    return Client(f"ip:{address}", quotas=quotas)


def _is_local(scope: Scope) -> bool:
    """A program on this machine: neither a page in a browser, nor a proxy, as far as one can be told."""
    if scope["http_version"] == "1.0":  # nginx's to what it passes on, with nothing that names the client
        return False
    try:
        loopback = ipaddress.ip_address((scope.get("client") or ("",))[0]).is_loopback
    except ValueError:
        return False
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"")
    name = host if host.endswith(b"]") else host.rpartition(b":")[0] or host
    # Origin: a page may send requests here; Host: a name of the page's own may lead here (DNS rebinding).
    return loopback and not headers.keys() & _FORWARDED and b"origin" not in headers and name in _LOCAL_NAMES
