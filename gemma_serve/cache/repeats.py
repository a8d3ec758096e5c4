"""Bodies that come again byte for byte: what they ask is known, so that nobody has to read them again."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from ..clients import Client
from ..engine.base import LoadedModel
from .answer import Answer
from .key import CacheKey

_MOST = 4096


class Origin(NamedTuple):
    """A request as it came."""

    route: str
    """All that matters besides the body, and who sent it."""
    body: bytes


class Repeat(NamedTuple):
    """What it asked the last time."""

    key: CacheKey
    loaded: LoadedModel
    """What ran then: the key holds only while it does."""
    model: str | None
    """As the body names it."""
    request_id: str | None
    """Likewise."""
    form: Any
    """How its client wants the answer, as the route knows it."""


class RepeatedHit(NamedTuple):
    answer: Answer
    public_id: str
    """See `GenerationRequest`."""
    form: Any


class Repeats:
    """Of the last 4,096 that were hits; a client finds only its own."""

    def __init__(self) -> None:
        self._known: dict[tuple[str | None, str, bytes], Repeat] = {}

    def find(self, client: Client | None, origin: Origin) -> Repeat | None:
        return self._known.get(_name(client, origin))

    def keep(self, client: Client | None, origin: Origin, repeat: Repeat) -> None:
        known = self._known
        known[_name(client, origin)] = repeat
        if len(known) > _MOST:
            del known[next(iter(known))]


def _name(client: Client | None, origin: Origin) -> tuple[str | None, str, bytes]:
    return None if client is None else client.id, origin.route, hashlib.sha256(origin.body).digest()
