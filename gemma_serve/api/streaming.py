"""Answers that go out as they come: keep-alives, deadlines, clients that leave, errors in the middle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.base import Delta, StreamHead
from ..errors import DeadlineExceeded, ServeError, ShuttingDown
from ..generation import Delivery
from ..logs import current_request
from .writers import Writer

logger = logging.getLogger(__name__)
T = TypeVar("T")


def stream_headers(content_type: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", content_type),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
    ]


EVENT_STREAM_HEADERS = stream_headers(b"text/event-stream; charset=utf-8")
JSON_LINES_HEADERS = stream_headers(b"application/x-ndjson")
TEXT_HEADERS = stream_headers(b"text/plain; charset=utf-8")


WRITE = "gemma_serve.write"
"""The extension of the ASGI scope by which `protocols` lets an answer that has begun be gone on with: a
function that takes bytes, or a list of texts for a WebSocket, and says whether it has sent them, past all
middleware."""


def _never(data: bytes) -> bool:
    return False


class ClientDisconnected(Exception):
    """The client has gone; nobody is left to answer."""


async def until_disconnect(receive: Receive, work: Awaitable[T], seconds: float | None = None) -> T:
    """Await `work`, but cancel it as soon as the client leaves. Raises `ClientDisconnected`.

    The request's body must have been read: what `receive` gives after it can only be the disconnect.
    Raises `DeadlineExceeded` after `seconds`, and `ShuttingDown` when the server cancels the request because
    the time to finish it has run out.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    reason: Exception | None = None

    def cancel(error: Exception) -> None:
        nonlocal reason
        if reason is None:
            reason = error
            task.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel(ClientDisconnected())

    def expire() -> None:
        if (record := current_request.get()) is not None:
            record.overdue = True
        cancel(DeadlineExceeded(f"The answer was not finished within {seconds:g} s."))

    watcher = loop.create_task(watch())
    timer = None
    if seconds is not None:
        timer = loop.call_later(seconds, expire)
    try:
        return await work
    except asyncio.CancelledError:
        if reason is None:
            reason = ShuttingDown("The server is shutting down and could not finish this answer.")
        task.uncancel()  # what follows (settling, telling the client) may wait
        raise reason from None
    finally:
        reason = None  # its traceback knows this frame
        watcher.cancel()
        if timer is not None:
            timer.cancel()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client waits: in silence, and in all; seconds, None for as long as it takes."""

    keep_alive: float | None = None
    deadline: float | None = None


class StreamedResponse(Response):
    """Sends bytes as they come.

    The status goes with the first of them, so that what fails before has an HTTP status of its own; what
    fails later is told in the stream. Server-sent events have comments in long silences (in the engine's
    queue, in a prefill, while a dead engine is replaced), as proxies cut connections on which nothing comes;
    the status then goes with the first comment.
    """

    def __init__(self, headers: list[tuple[bytes, bytes]], patience: Patience) -> None:
        self.background = None  # FastAPI asks; nothing else of the base class is used
        self._stream_headers = headers
        self._patience = patience
        self._started = False
        self._sending = False
        self._silent = True
        self._ended = False

    async def run(self) -> bytes:
        """Send everything but the end, which is returned."""
        raise NotImplementedError

    def render_error(self, error: ServeError) -> bytes:
        """The end of a stream that fails."""
        return b"data: " + orjson.dumps(error.body()) + b"\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._asgi_send = send
        self._write: Callable[[bytes], bool] = scope.get("extensions", {}).get(WRITE, _never)
        loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        if self._patience.keep_alive and self._stream_headers is EVENT_STREAM_HEADERS:
            self._timer = loop.call_later(self._patience.keep_alive / 2, self._tick, loop)
        try:
            end = await until_disconnect(receive, self.run(), self._patience.deadline)
        except ClientDisconnected:
            return
        except ServeError as error:
            if not self._started:
                raise
            logger.warning("A stream ended early: %s", error.message)
            end = self.render_error(error)
        finally:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
        if not self._started:
            raise _without_a_token()
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def emit(self, data: bytes) -> None:
        self._silent = False
        self._sending = True
        if not self._started:
            self._started = True
            await self._asgi_send(
                {"type": "http.response.start", "status": 200, "headers": self._stream_headers}
            )
        await self._asgi_send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending = False

    def write(self, data: bytes) -> bool:
        """`emit` without waiting, where the server can and the client reads; otherwise False."""
        if not self._started or self._sending or not self._write(data):
            return False
        self._silent = False
        return True

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        # A client that does not read needs no comments: `emit` still waits for it.
        if self._silent and not self._sending:
            self._comment = loop.create_task(self._keep_alive())
        self._silent = True
        assert self._patience.keep_alive is not None
        # Silent for a whole interval between two ticks: so a comment comes after one at the latest.
        self._timer = loop.call_later(self._patience.keep_alive / 2, self._tick, loop)

    async def _keep_alive(self) -> None:
        if not self._ended:
            await self.emit(b": keep-alive\n\n")


def _without_a_token() -> ServeError:
    return ServeError("The engine ended the answer without a token; the server's log says why.")


class GenerationStream(StreamedResponse):
    """A generation as it comes: `open` begins it, `make_writer` knows its form."""

    def __init__(
        self,
        open: Callable[[], Awaitable[Delivery]],
        make_writer: Callable[[StreamHead], Writer],
        headers: list[tuple[bytes, bytes]],
        patience: Patience,
        n: int,
    ) -> None:
        super().__init__(headers, patience)
        self._open = open
        self._make_writer = make_writer
        self._writer: Writer | None = None
        self._n = n
        self._chunks: list[bytes] = []

    async def run(self) -> bytes:
        self._stream = stream = await self._open()
        try:
            await stream.feed(self)
            if self._writer is None:
                raise _without_a_token()
            return self._writer.ending()
        finally:
            await stream.aclose()

    # It is the `Sink` of its stream.

    def put(self, delta: Delta) -> None:
        self._chunks.append(self._ready_writer().delta(delta))

    def put_texts(self, texts: list[str]) -> None:
        self._chunks.append(self._ready_writer().run(0, texts))

    def _ready_writer(self) -> Writer:
        if self._writer is None:
            self._writer = self._make_writer(self._stream.tokens)
            self._stream.note_first_token()
            self._chunks.append(self._writer.opening(self._n))
        return self._writer

    def flush(self) -> bool:
        # While the client does not read, joining all that waits for it at each step would hold up the others.
        if self._chunks and (self._sending or not self.write(b"".join(self._chunks))):
            return False
        self._chunks.clear()
        return True

    async def drain(self) -> None:
        while self._chunks:
            data = b"".join(self._chunks)
            self._chunks.clear()
            await self.emit(data)

    def render_error(self, error: ServeError) -> bytes:
        return super().render_error(error) if self._writer is None else self._writer.error(error)
