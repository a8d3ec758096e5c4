"""uvicorn's WebSocket with limits."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from ..api.streaming import WRITE
from .patience import PatientOnce

_MOST_FRAGMENTS = 4_096  # of a message


class WebSocketProtocol(PatientOnce, WebSocketsSansIOProtocol):
    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = {**(self.scope["extensions"] or {}), WRITE: self._write_texts}
        self.scope["extensions"] = extensions
        await super().run_asgi()

    def _write_texts(self, texts: list[bytes]) -> bool:
        """Send them as uvicorn's `send` would; False if it would wait."""
        if not self.writable.is_set() or self.close_sent or self.disconnected:
            return False
        if self.conn.state is not State.OPEN:
            return False
        for text in texts:
            self.conn.send_text(text)
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:  # a client that sends pings and reads nothing must not fill the memory with what answers them
            self.conn.data_to_send()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent:  # or uvicorn would log an error for each handshake that is refused with a status
            self.handshake_complete = True

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= _MOST_FRAGMENTS:  # empty ones never reach the limit of bytes
            self._fail(1009)
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # uvicorn would write a traceback into the log for it
                self._fail(1007)
                return
        super().send_receive_event_to_app()

    def _fail(self, code: int) -> None:
        self.frames = []
        if not self.close_sent and not self.disconnected:
            self.conn.send_close(code)
            self.handle_parser_exception()
