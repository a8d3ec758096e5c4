"""The open WebSockets: how many there may be; they are let go when nobody uses them or the server ends."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from .clients import Client
from .errors import RateLimited, Unavailable
from .periodic import every
from .settings import ChatSettings

Reason = Literal["shutdown", "idle"]
_MOST_SWEEP_SECONDS = 5.0


class TooManyConnections(RateLimited):
    code = "too_many_connections"


class Connection(Protocol):
    client: Client
    last_used: float
    """When its client sent something or its answer ended, `time.monotonic()`; infinity while one runs."""

    def go_away(self, reason: Reason) -> None:
        """Tell the client, and close when the running answer has ended."""
        ...

    def give_up(self) -> None:
        """End the running answer with an error."""
        ...


class Connections:
    """One sweep looks after all of them: a timer each would cost what thousands of idle clients must not."""

    def __init__(self, settings: ChatSettings) -> None:
        self._most = settings.max_connections
        self._most_per_client = settings.max_connections_per_client
        self._idle_seconds = settings.idle_timeout_seconds
        self._open: set[Connection] = set()
        self._by_client: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> None:
        """`leave` with it when it has ended. Raises `Unavailable`, `RateLimited`."""
        client = connection.client.id
        if len(self._open) >= self._most:
            raise Unavailable(
                f"This server has {self._most:,} chats open, and takes no more. Try again shortly.",
                code="too_many_connections",
            )
        if 0 < self._most_per_client <= self._by_client[client]:
            raise TooManyConnections(
                f"You have {self._most_per_client:,} chats open, which is the limit; close one.",
                "requests",
                5,
            )
        self._open.add(connection)
        self._by_client[client] += 1

    def leave(self, connection: Connection) -> None:
        if connection not in self._open:
            return
        self._open.discard(connection)
        client = connection.client.id
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def go_away(self) -> None:
        """The server is about to end."""
        for connection in list(self._open):
            connection.go_away("shutdown")

    def give_up(self) -> None:
        """It ends now."""
        for connection in list(self._open):
            connection.give_up()

    def swept(self) -> AbstractAsyncContextManager[None]:
        """Within it idle connections are let go."""
        return every(min(self._idle_seconds / 4, _MOST_SWEEP_SECONDS), self._sweep)

    async def _sweep(self) -> None:
        since = time.monotonic() - self._idle_seconds
        for connection in [one for one in self._open if one.last_used < since]:
            connection.go_away("idle")
