"""Server-sent events written straight from deltas: the parts that never change are rendered once a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.base import Delta, Kind, TokenStream
from ..errors import ServeError, ShuttingDown
from ..generation import RecordedStream

logger = logging.getLogger(__name__)
T = TypeVar("T")

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]
_DONE = b"data: [DONE]\n\n"


def error_event(error: ServeError) -> bytes:
    """How a stream that has begun ends when it fails."""
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


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


class EventStream(Response):
    """A response that sends a generation as OpenAI's chunks.

    The status is sent with the first tokens, so that what fails before them has an HTTP status of its own.
    """

    def __init__(self, kind: Kind, stream: RecordedStream, body: dict[str, Any]) -> None:
        self.background = None  # FastAPI asks; nothing else of the base class is used
        self._stream = stream
        self._started = False
        self._n = body.get("n") or 1
        self._include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._render = ChunkWriter(kind, stream.tokens, self._include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnected:
            pass
        except ShuttingDown as error:
            if not self._started:
                raise
            await send({"type": "http.response.body", "body": error_event(error), "more_body": False})

    async def _send(self, send: Send) -> None:
        try:
            async for deltas in self._stream:
                chunks = b"".join(map(self._render.delta, deltas))
                if not self._started:
                    self._started = True
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS}
                    )
                    chunks = self._render.opening(self._n) + chunks
                await send({"type": "http.response.body", "body": chunks, "more_body": True})
            ending = (self._render.usage() if self._include_usage else b"") + _DONE
        except ServeError as error:
            if not self._started:
                raise
            logger.warning("A stream ended early: %s", error.message)
            ending = error_event(error)
        finally:
            await self._stream.aclose()
        if not self._started:
            raise ServeError("The engine ended the answer without a token; the server's log says why.")
        await send({"type": "http.response.body", "body": ending, "more_body": False})


class ChunkWriter:
    """Renders the deltas of one stream as `data: {…}` events."""

    def __init__(self, kind: Kind, stream: TokenStream, include_usage: bool) -> None:
        self._chat = kind == "chat"
        self._stream = stream
        constant = {
            "id": stream.id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": stream.created,
            "model": stream.model,
            "system_fingerprint": stream.fingerprint,
        }
        self._head = b"data: " + orjson.dumps(constant)[:-1]
        # OpenAI sends a null usage with every chunk but the last when it was asked for.
        self._usage = b',"usage":null' if include_usage else b""
        self._tail = b"]" + self._usage + b"}\n\n"
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
        return b"".join((self._head, b',"choices":[', orjson.dumps(choice), b"]", usage, more, b"}\n\n"))

    def usage(self) -> bytes:
        """The last chunk, when the client asked for token counts."""
        return self._head + b',"choices":[],"usage":' + orjson.dumps(self._stream.usage.body()) + b"}\n\n"
