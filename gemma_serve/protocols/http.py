"""uvicorn's HTTP connection with limits."""

from __future__ import annotations

import asyncio
import functools
import weakref
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..api.streaming import WRITE
from ..errors import HeadTooLarge, InvalidRequest, RequestTimeout, ServeError, Unavailable
from ..turns import Turns
from .answer_transport import AnswerTransport
from .patience import PatientOnce

_MOST_HEADERS = 128
_PROBES = b"/health"
_LINGER_SECONDS = 5.0
_SPARE_CONNECTIONS = 64  # beyond the setting: probes are answered there, and others told


class HttpProtocol(PatientOnce, HttpToolsProtocol):
    starts: Turns

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0  # of the head, and of trailers and whatever else comes after the body
        self._refusal: ServeError | None = None
        self._answered: RequestResponseCycle | None = None
        self._lingering = False
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections + _SPARE_CONNECTIONS:
            transport.abort()
            return
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)
        # uvicorn tells only the last request that came, which waits where a client sends several at once.
        if (cycle := self._answered) is not None and not cycle.response_complete:
            _disconnect(cycle)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
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
                hang_up = functools.partial(_hang_up, weakref.ref(self))
                answer = AnswerTransport(self.transport, self.loop, hang_up)
                self.cycle.transport = answer  # type: ignore[assignment]
            # Weakly: its scope is its own, so only the garbage collector would find what else held it.
            extensions[WRITE] = functools.partial(_write, weakref.ref(self.cycle))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        start = functools.partial(super()._start_asgi_task, cycle, app)
        if self.url.startswith(_PROBES):
            start()
        else:
            self.starts.take(start)

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
        cycle, answered = self.cycle, self._answered  # while a head is read, `cycle` is the last request's
        for each in (cycle, answered):
            if each is not None and not each.response_complete:
                _disconnect(each)
        free = cycle is None or (cycle.response_complete if self._in_head else not cycle.response_started)
        if free and (answered is cycle or answered is None or answered.response_complete):
            self._answer(error)
            self.linger()
        else:  # it would come in the midst of an answer, of this request or one before it
            self.transport.close()

    def on_response_complete(self) -> None:
        if not self._lingering:  # what has come behind it is not answered any more
            super().on_response_complete()

    def shutdown(self) -> None:
        if self._lingering:
            self.transport.close()
        else:
            super().shutdown()

    def hang_up(self) -> None:
        """The answer has been written, and is the last."""
        if self._in_head:  # its request has come whole
            self.transport.close()
        else:
            self.linger()

    def linger(self) -> None:
        """Close once the client has, or soon: what it still sends would make the system reset the connection,
        and who has not read the answer yet, such as a proxy that sends a body, would lose it (RFC 9112, 9.6).
        """
        crowded = len(self.connections) > self.limits.max_connections
        if crowded or not self.transport.can_write_eof():
            self.transport.close()
        elif not self._lingering and self._open():
            self._stop_read_timer()
            self._lingering = True
            self.transport.write_eof()
            self.flow.resume_reading()
            self._linger_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

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
        return not (self._lingering or self.transport.is_closing())

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


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.waiting_for_100_continue = False  # or `receive` would write
    cycle.message_event.set()


def _hang_up(protocol: weakref.ref[HttpProtocol]) -> None:
    if (connection := protocol()) is not None:
        connection.hang_up()


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
