"""uvicorn's connections with limits of their own: long heads, slow senders, readers that stop, their number.

httptools takes a head of any size, and uvicorn waits for ever for the rest of a request or for a reader who
has stopped. The application cannot mend that: it does not run yet, or it waits itself. Nor can it mend that
uvicorn begins all requests at once that come together: a probe would wait for hundreds of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from .api.streaming import WRITE
from .errors import HeadTooLarge, InvalidRequest, RequestTimeout, ServeError, Unavailable
from .settings import ServerSettings

_MOST_HEADERS = 128
_LEAST_READ = 65_536  # bytes in that time: one who takes less would hold a place in the engine for ever
_MOST_FRAGMENTS = 4_096  # of a WebSocket's message
_BEGIN_AT_ONCE = 16  # requests in one round of the event loop: each costs it a millisecond
_CONTINUE = b"HTTP/1.1 100 "
_PROBES = b"/health"
_SPARE_CONNECTIONS = 64  # beyond the setting: probes are answered there, and others told


def protocols(limits: ServerSettings) -> dict[str, Any]:
    """Arguments of `uvicorn.Config`."""
    members = {"limits": limits}
    return {
        "http": type("Http", (HttpProtocol,), members | {"starts": Starts()}),
        "ws": type("WebSocket", (WebSocketProtocol,), members),
        "ws_max_size": limits.max_body_bytes,
        "ws_per_message_deflate": False,  # would gain little on tokens, and keep a window for each client
        "ws_ping_interval": limits.ping_seconds or None,
        "ws_ping_timeout": limits.write_timeout_seconds,
        "timeout_keep_alive": limits.idle_timeout_seconds,
    }


class Starts:
    """Lets a few requests begin in each round of the event loop, in the order in which they came."""

    def __init__(self) -> None:
        self._left = _BEGIN_AT_ONCE
        self._waiting: deque[Callable[[], None]] = deque()
        self._nobodys = contextvars.Context()

    def begin(self, start: Callable[[], None]) -> None:
        if not self._left:
            self._waiting.append(start)
            return
        if self._left == _BEGIN_AT_ONCE:
            # Or those who wait would inherit the variables of the request whose end has begun this one.
            asyncio.get_running_loop().call_soon(self._next_round, context=self._nobodys)
        self._left -= 1
        start()

    def _next_round(self) -> None:
        self._left = _BEGIN_AT_ONCE
        while self._waiting and self._left:
            self.begin(self._waiting.popleft())


class PatientOnce:
    """Ends a connection whose other end does not read, and with it the generation that it was for."""

    limits: ServerSettings
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _write_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._stop_write_timer()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_write_timer()
        super().connection_lost(exc)  # type: ignore[misc]

    def _expect_reading(self) -> None:
        unread, seconds = self.transport.get_write_buffer_size(), self.limits.write_timeout_seconds
        self._write_timer = self.loop.call_later(seconds, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() <= unread - _LEAST_READ:
            self._expect_reading()  # a large answer over a slow line
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class WebSocketProtocol(PatientOnce, WebSocketsSansIOProtocol):
    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = {**(self.scope["extensions"] or {}), WRITE: self._write_texts}
        self.scope["extensions"] = extensions
        await super().run_asgi()

    def _write_texts(self, texts: list[bytes]) -> bool:
        """Send them as uvicorn's `send` would; False if it would wait."""
        if not self.writable.is_set() or self.close_sent or self.conn.state is not State.OPEN:
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


class AnswerTransport:
    """Writes an answer's head together with what follows it at once: one packet, which is most of a write."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
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
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HttpProtocol(PatientOnce, HttpToolsProtocol):
    starts: Starts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0  # of the head, and of trailers and whatever else comes after the body
        self._refusal: ServeError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections + _SPARE_CONNECTIONS:
            transport.abort()
            return
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._in_head:
            self._start_read_timer()  # the parser says nothing of empty lines before a request
        super().data_received(data)
        # Seen from here, because the parser keeps a header to itself until it is whole.
        if self._head_bytes > self.limits.max_header_bytes and self._open():
            self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_read_timer()

    def on_headers_complete(self) -> None:
        self._refusal = self._reason_to_refuse()
        if self._refusal is not None:
            raise self._refusal  # the parser stops, and `send_400_response` is called
        self._in_head = False
        extensions: dict[str, Any] = {}
        self.scope["extensions"] = extensions
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            if self.scope["method"] != "HEAD":  # nothing follows
                self.cycle.transport = AnswerTransport(self.transport, self.loop)  # type: ignore[assignment]
            # Weakly: its scope is its own, so only the garbage collector would find what else held it.
            extensions[WRITE] = functools.partial(_write, weakref.ref(self.cycle))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        start = functools.partial(super()._start_asgi_task, cycle, app)
        if self.url.startswith(_PROBES):
            start()
        else:
            self.starts.begin(start)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_read_timer()
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._stop_read_timer()
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        if self._open():
            self._refuse(
                self._refusal or InvalidRequest("This is not a valid HTTP request.", code="invalid_http")
            )

    def _reason_to_refuse(self) -> ServeError | None:
        limits = self.limits
        if len(self.headers) > _MOST_HEADERS:
            return self._head_too_large()
        if self._head_bytes > limits.max_header_bytes:  # it may be the body's start that makes it so
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limits.max_header_bytes:
                return self._head_too_large()
        if len(self.connections) > limits.max_connections and not self.url.startswith(_PROBES):
            message = "This server has as many connections as it takes. Try again shortly."
            return Unavailable(message, retry_after=5, code="too_many_connections")
        return None

    def _head_too_large(self) -> ServeError:
        most = f"{self.limits.max_header_bytes:,} bytes or {_MOST_HEADERS} headers"
        return HeadTooLarge(f"The request's URL and headers are larger than {most}.")

    def _refuse(self, error: ServeError) -> None:
        """Answer in place of the application, unless it is answering, and close."""
        self._stop_read_timer()
        cycle = self.cycle  # while a head is read, it is the last request's
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or (cycle.response_complete if self._in_head else not cycle.response_started):
            self._answer(error)
        self.transport.close()

    def _answer(self, error: ServeError) -> None:
        body = orjson.dumps(error.body())
        headers = error.headers | {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
        self.transport.write(b"".join((STATUS_LINE[error.status], *lines, b"\r\n", body)))

    def _open(self) -> bool:
        return not self.transport.is_closing()

    def _start_read_timer(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.limits.read_timeout_seconds, self._read_too_slow)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _read_too_slow(self) -> None:
        self._read_timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (self._in_head and answering):
            self._start_read_timer()  # it is we who do not read, or whom the client waits for
        elif self._in_head and not self._head_bytes:
            self.transport.close()
        elif self._open():
            seconds = self.limits.read_timeout_seconds
            self._refuse(RequestTimeout(f"The whole request did not arrive within {seconds:g} s."))


def _write(answered: weakref.ref[RequestResponseCycle], data: bytes) -> bool:
    """Go on with an answer in chunks that has begun, as uvicorn's `send` would; False if it would wait."""
    cycle = answered()
    if cycle is None or cycle.flow.write_paused or cycle.disconnected:
        return False
    if cycle.response_complete or not cycle.chunked_encoding:
        return False
    if data:  # an empty chunk would be the answer's end
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
