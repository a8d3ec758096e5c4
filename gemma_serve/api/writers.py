"""Forms of a stream, written straight from deltas: the parts that never change are rendered once a stream."""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from ..engine.base import Delta, Kind, StreamHead
from ..errors import ServeError


class Writer(Protocol):
    """Renders one stream."""

    def opening(self, n: int) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def run(self, index: int, texts: list[str]) -> bytes:
        """Deltas of one choice that have nothing but text, which is not empty."""
        ...

    def ending(self) -> bytes: ...

    def error(self, error: ServeError) -> bytes:
        """How a stream that has begun ends when it fails."""
        ...


class TextWriter:
    """The bare text, for who reads it in a terminal."""

    def opening(self, n: int) -> bytes:
        return b""

    def delta(self, delta: Delta) -> bytes:
        return (delta.text or (delta.delta or {}).get("content") or "").encode()

    def run(self, index: int, texts: list[str]) -> bytes:
        return "".join(texts).encode()

    def ending(self) -> bytes:
        return b""

    def error(self, error: ServeError) -> bytes:
        return f"\n[error: {error.message}]\n".encode()


class ChunkWriter:
    """OpenAI's chunks, as server-sent events (`data: {…}`) or one JSON object a line."""

    def __init__(
        self, kind: Kind, stream: StreamHead, include_usage: bool, *, json_lines: bool = False
    ) -> None:
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

    def run(self, index: int, texts: list[str]) -> bytes:
        start, end = (b',"delta":{"content":', b"}") if self._chat else (b',"text":', b"")
        before = b"%b%d%b" % (self._choice, index, start)
        after = b'%b,"logprobs":null,"finish_reason":null}%b' % (end, self._tail)
        return b"".join((before, (after + before).join(map(orjson.dumps, texts)), after))

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
