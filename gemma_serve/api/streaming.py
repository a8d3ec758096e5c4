"""Streams written straight from deltas: the parts that never change are rendered once a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.base import Delta, Kind, TokenStream
from ..errors import ServeError, ShuttingDown
from ..generation import RecordedStream

logger = logging.getLogger(__name__)
T = TypeVar("T")


def stream_headers(content_type: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", content_type),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
    ]


EVENT_STREAM_HEADERS = stream_headers(b"text/event-stream; charset=utf-8")


class ClientDisconnected(Exception):
    """The client has gone; nobody is left to answer."""


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it as soon as the client leaves. Raises `ClientDisconnected`.

    The request's body must have been read: what `receive` gives after it can only be the disconnect.
    Raises `ShuttingDown` when the server cancels the request because the time to finish it has run out.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
    except asyncio.CancelledError:
        raise ShuttingDown("The server is shutting down and could not finish this answer.") from None
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
    return task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class GenerationStream(Response):
    """A response that sends a generation as it comes, in the form of `writer`.

    The status is sent with the first tokens, so that what fails before them has an HTTP status of its own.
    """

    def __init__(self, stream: RecordedStream, writer: Writer, n: int) -> None:
        self.background = None  # FastAPI asks; nothing else of the base class is used
        self._stream = stream
        self._started = False
        self._writer = writer
        self._n = n

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnected:
            pass
        except ShuttingDown as error:
            if not self._started:
                raise
            await send({"type": "http.response.body", "body": self._writer.error(error), "more_body": False})

    async def _send(self, send: Send) -> None:
        try:
            async for deltas in self._stream:
                chunks = b"".join(map(self._writer.delta, deltas))
                if not self._started:
                    self._started = True
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": self._writer.headers}
                    )
                    chunks = self._writer.opening(self._n) + chunks
                await send({"type": "http.response.body", "body": chunks, "more_body": True})
            ending = self._writer.ending()
        except ServeError as error:
            if not self._started:
                raise
            logger.warning("A stream ended early: %s", error.message)
            ending = self._writer.error(error)
        finally:
            await self._stream.aclose()
        if not self._started:
            raise ServeError("The engine ended the answer without a token; the server's log says why.")
        await send({"type": "http.response.body", "body": ending, "more_body": False})


class Writer(Protocol):
    """Renders one stream."""

    headers: list[tuple[bytes, bytes]]

    def opening(self, n: int) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def ending(self) -> bytes: ...

    def error(self, error: ServeError) -> bytes:
        """How a stream that has begun ends when it fails."""
        ...


class TextWriter:
    """The bare text, for who reads it in a terminal."""

    headers = stream_headers(b"text/plain; charset=utf-8")

    def opening(self, n: int) -> bytes:
        return b""

    def delta(self, delta: Delta) -> bytes:
        return (delta.text or (delta.delta or {}).get("content") or "").encode()

    def ending(self) -> bytes:
        return b""

    def error(self, error: ServeError) -> bytes:
        return f"\n[error: {error.message}]\n".encode()


class ChunkWriter:
    """OpenAI's chunks, as server-sent events (`data: {…}`) or one JSON object a line."""

    def __init__(
        self, kind: Kind, stream: TokenStream, include_usage: bool, *, json_lines: bool = False
    ) -> None:
        self.headers = stream_headers(b"application/x-ndjson") if json_lines else EVENT_STREAM_HEADERS
        start, end = (b"", b"\n") if json_lines else (b"data: ", b"\n\n")
        self._start, self._end = start, end
        self._done = b"" if json_lines else b"data: [DONE]\n\n"
        self._include_usage = include_usage
        self._chat = kind == "chat"
        self._stream = stream
        constant = {
            "id": stream.id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": stream.created,
            "model": stream.model,
            "system_fingerprint": stream.fingerprint,
        }
        self._head = start + orjson.dumps(constant)[:-1]
        # OpenAI sends a null usage with every chunk but the last when it was asked for.
        self._usage = b',"usage":null' if include_usage else b""
        self._tail = b"]" + self._usage + b"}" + end
        self._choice = self._head + b',"choices":[{"index":'

    def opening(self, n: int) -> bytes:
        """The chunks that say who speaks, one a choice; completions have none."""
        if not self._chat:
            return b""
        role = (
            b',"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
        )
        return b"".join(b"%b%d%b%b" % (self._choice, index, role, self._tail) for index in range(n))

    def delta(self, delta: Delta) -> bytes:
        if delta.choice is not None or delta.extra is not None or delta.delta is not None:
            return self._detailed(delta)
        text = orjson.dumps(delta.text)
        reason = b"null" if delta.finish_reason is None else orjson.dumps(delta.finish_reason)
        parts: tuple[bytes, ...]
        if not self._chat:
            parts = (
                self._choice,
                b"%d" % delta.index,
                b',"text":',
                text,
                b',"logprobs":null,"finish_reason":',
                reason,
            )
        elif delta.text:
            parts = (self._choice, b"%d" % delta.index, b',"delta":{"content":', text,
                     b'},"logprobs":null,"finish_reason":', reason)  # fmt: skip
        else:
            parts = (
                self._choice,
                b"%d" % delta.index,
                b',"delta":{},"logprobs":null,"finish_reason":',
                reason,
            )
        return b"".join((*parts, b"}", self._tail))

    def _detailed(self, delta: Delta) -> bytes:
        choice: dict[str, Any] = {"index": delta.index}
        if self._chat:
            content = {"content": delta.text} if delta.text else {}
            choice["delta"] = content if delta.delta is None else delta.delta
        else:
            choice["text"] = delta.text
        choice |= {"logprobs": None, "finish_reason": delta.finish_reason} | (delta.choice or {})
        extra = delta.extra or {}
        usage = b"" if "usage" in extra else self._usage
        more = b"," + orjson.dumps(extra)[1:-1] if extra else b""
        return b"".join(
            (self._head, b',"choices":[', orjson.dumps(choice), b"]", usage, more, b"}", self._end)
        )

    def ending(self) -> bytes:
        """The last chunk has the token counts, when the client asked for them."""
        if not self._include_usage:
            return self._done
        counts = orjson.dumps(self._stream.usage.body())
        return b"".join((self._head, b',"choices":[],"usage":', counts, b"}", self._end, self._done))

    def error(self, error: ServeError) -> bytes:
        return self._start + orjson.dumps(error.body()) + self._end
