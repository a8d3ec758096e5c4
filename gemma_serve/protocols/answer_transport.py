"""How an answer's bytes reach the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

_CONTINUE = b"HTTP/1.1 100 "


class AnswerTransport:
    """Writes an answer's head together with what follows it at once: one packet, which is most of a write."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, hang_up: Callable[[], None]
    ) -> None:
        """`hang_up` closes the connection."""
        self._transport = transport
        self._loop = loop
        self._hang_up = hang_up
        self._head = b""

    def write(self, data: bytes) -> None:
        if data.startswith(_CONTINUE):  # the client waits for it to send its body
            self._transport.write(data)
            return
        self._head = data
        self.write = self._write_with_head  # type: ignore[method-assign]
        self._loop.call_soon(self._write_head)  # what follows may take its time

    def _write_with_head(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self.write = self._transport.write  # type: ignore[method-assign]
        self._transport.write(head + data)

    def _write_head(self) -> None:
        if self._head and not self._transport.is_closing():
            self._write_with_head(b"")

    def close(self) -> None:
        self._write_head()
        self._hang_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
