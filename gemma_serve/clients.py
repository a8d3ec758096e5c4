"""Who asks: the sender of a request, as authentication found it and as limits, models and logs need it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Scope = Literal["inference", "admin", "metrics"]


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much one client may take; 0 is without limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    in_flight: int = 0
    """Requests at the same time."""


@dataclass(frozen=True, slots=True)
class Client:
    id: str
    """`key:<name>`, or `ip:<address>` for who has none: what limits, blocks and usage count by."""
    key: str | None = None
    """The key's name, never the key."""
    scopes: frozenset[Scope] = frozenset({"inference"})
    models: frozenset[str] = frozenset()
    """The served models that it may use; all of them when empty."""
    quotas: Quotas = Quotas()
    weight: float = 1.0
    """Its share of the engine when several clients wait."""
    priority: int = 0
    """Its class in the queue: a lower one goes first, whatever the shares."""


current_client: ContextVar[Client | None] = ContextVar("current_client", default=None)
"""The sender of the request being served; None outside of one."""

authenticate_again: ContextVar[Callable[[], Awaitable[Client]]] = ContextVar("authenticate_again")
"""On a WebSocket: whose it is now. Raises what a new request would get, as where its key was revoked."""
