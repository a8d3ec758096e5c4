"""What a WebSocket chat sends: every message with its session's id, until the connection ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.types import Message, Scope, Send

from ..chat_protocol import error_data, message
from ..errors import ServeError
from ..sessions import Sessions
from .streaming import WRITE


class ClientLeft(Exception):
    """Nobody is left to tell."""


class Reply(NamedTuple):
    text: bytes
    status: int = 200
    close: int | None = None
    """The code to close with, if it is the last."""


class Outbox:
    """What sends waits while the client does not read, which `protocols` ends; raises `ClientLeft`."""

    __slots__ = ("_send", "_waiting", "_write", "closed", "session_id")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._waiting = 0  # messages that the client has not made room for
        self._write: Callable[[list[bytes]], bool] | None = scope.get("extensions", {}).get(WRITE)
        self.closed = False
        self.session_id = Sessions.new_id()

    def message(self, kind: str, message_id: str | None, data: dict[str, Any]) -> bytes:
        return message(kind, self.session_id, message_id, data)

    def error(self, message_id: str | None, error: ServeError) -> bytes:
        return self.message("error", message_id, error_data(error))

    async def say(self, kind: str, message_id: str | None, data: dict[str, Any]) -> None:
        await self.send(self.message(kind, message_id, data))

    async def send(self, text: bytes) -> None:
        await self._emit({"type": "websocket.send", "text": text.decode()})

    @property
    def waiting(self) -> bool:
        """For the client to read."""
        return self._waiting > 0

    def write(self, texts: list[bytes]) -> bool:
        """`send` all of them without waiting, or, where that cannot be, none: False."""
        return bool(self._write and not self._waiting and not self.closed and self._write(texts))

    async def reply(self, reply: Reply) -> None:
        await self.send(reply.text)
        if reply.close is not None:
            await self.close(reply.close)

    async def accept(self, subprotocol: str | None) -> None:
        await self._emit({"type": "websocket.accept", "subprotocol": subprotocol})

    async def close(self, code: int, reason: str = "") -> None:
        await self._emit({"type": "websocket.close", "code": code, "reason": reason})
        self.closed = True

    async def _emit(self, event: Message) -> None:
        if self.closed:
            raise ClientLeft
        self._waiting += 1
        try:
            await self._send(event)
        except (OSError, RuntimeError) as error:  # uvicorn's, where it has closed the connection by itself
            raise ClientLeft from error
        finally:
            self._waiting -= 1
