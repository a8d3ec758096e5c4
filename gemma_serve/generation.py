"""One generation from request to usage: is the engine ready, the engine, the accounting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from .engine.base import Delta, Engine, GenerationRequest, RelayKind, TokenStream
from .logs import RequestRecord, current_request
from .rate_limit import abandon, reserve_tokens
from .token_usage import estimate_tokens, note_answer, noted_events


class Generator:
    """Runs requests on the engine. Raises `ServeError`; cancelling or closing stops the engine's work."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def complete(self, request: GenerationRequest) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        self._engine.status.require_ready()
        await reserve_tokens(lambda: estimate_tokens(request.body))
        try:
            answer, usage = await self._engine.complete(request)
        except asyncio.CancelledError:
            abandon()
            raise
        if (record := current_request.get()) is not None:
            record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        return answer

    async def stream(self, request: GenerationRequest) -> RecordedStream:
        """The answer as it comes."""
        self._engine.status.require_ready()
        await reserve_tokens(lambda: estimate_tokens(request.body))
        started = time.perf_counter()
        return RecordedStream(await self._engine.stream(request), started)

    async def relay(self, kind: RelayKind, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[bytes]:
        """The answer of vLLM's own handler, or its server-sent events."""
        if kind not in ("responses", "messages"):  # the others generate nothing
            return await self._engine.relay(kind, body)
        await reserve_tokens(lambda: estimate_tokens(body))
        answer = await self._engine.relay(kind, body)
        record = current_request.get() or RequestRecord("")
        if not isinstance(answer, dict):
            return noted_events(answer, record)
        note_answer(answer, record)
        return answer


class RecordedStream:
    """A `TokenStream` that writes its times and counts into the request's record."""

    def __init__(self, stream: TokenStream, started: float) -> None:
        self.tokens = stream
        self._record = current_request.get() or RequestRecord(stream.id)
        self._started = started

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        record = self._record
        async for deltas in self.tokens:
            if record.time_to_first_token is None:
                record.time_to_first_token = time.perf_counter() - self._started
            yield deltas

    async def aclose(self) -> None:
        """Stop the generation if it still runs. Call it however the iteration ended."""
        await self.tokens.aclose()
        usage = self.tokens.usage
        self._record.prompt_tokens, self._record.completion_tokens = (
            usage.prompt_tokens,
            usage.completion_tokens,
        )
