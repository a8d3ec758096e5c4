"""What a WebSocket chat receives: messages that are checked, and a count of the wrong ones."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from starlette.types import Message

from ..chat_protocol import LONGEST_ID, REQUESTS, Data, Envelope
from ..errors import InvalidRequest, PayloadTooLarge, ServeError
from ..settings import Settings
from .body import parse_json, validated

_MOST_FAULTS, _FAULT_SECONDS = 10.0, 60.0
CHEAP = 0.1
"""Of a fault: what is neither limited nor logged must not be free."""


class Incoming(NamedTuple):
    kind: str
    id: str | None
    data: Data


class WrongMessage(Exception):
    """`error` is what to answer the message `id` with."""

    def __init__(self, message_id: str | None, error: ServeError) -> None:
        super().__init__(error.message)
        self.id, self.error = message_id, error


def read_message(event: Message, settings: Settings) -> Incoming:
    """Raises `WrongMessage`."""
    message_id: str | None = None
    try:
        body = _parse(event, settings)
        if isinstance(given := body.get("id"), str) and len(given) <= LONGEST_ID:
            message_id = given
        kind = validated(Envelope, body).type
        if (schema := REQUESTS.get(kind)) is None:
            raise InvalidRequest(
                f"There is no message type {kind!r:.50}; there are {', '.join(REQUESTS)}.",
                param="type",
                code="unknown_type",
            )
        return Incoming(kind, message_id, validated(schema, body.get("data") or {}))
    except ServeError as error:
        raise WrongMessage(message_id, error) from error


def _parse(event: Message, settings: Settings) -> dict[str, Any]:
    if (text := event.get("text")) is None:
        raise InvalidRequest("Send text frames: binary ones have no meaning here.", code="binary_frame")
    raw = text.encode()
    if len(raw) > (most := settings.chat.max_message_bytes):
        raise PayloadTooLarge(f"The message has {len(raw):,} bytes; at most {most:,}.")
    return parse_json(raw, settings.limits.max_json_depth, "message")


class Faults:
    """The wrong messages of one client, which are forgotten with time."""

    __slots__ = ("_at", "_count")

    def __init__(self) -> None:
        self._count = self._at = 0.0

    def too_many(self, weight: float = 1.0) -> bool:
        """With one more."""
        now = time.monotonic()
        forgotten = (now - self._at) * _MOST_FAULTS / _FAULT_SECONDS
        self._count, self._at = max(0.0, self._count - forgotten) + weight, now
        return self._count > _MOST_FAULTS
