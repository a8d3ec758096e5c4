"""One generation from request to usage: token quota, admission, the engine, the accounting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from .admission import Admission, Slot
from .cache import Answer, CacheKey
from .clients import current_client
from .engine.base import Delta, Engine, GenerationRequest, RelayKind, TokenStream
from .logs import RequestRecord, current_request
from .rate_limit import abandon, reserve_tokens
from .token_usage import estimate_tokens, note_answer, noted_events

_WITHOUT_ENGINE = {"tokenize", "detokenize", "count_tokens"}


class Generator:
    """Runs requests on the engine. Raises `ServeError`; cancelling or closing stops the engine's work."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def require_room(self, body_bytes: int) -> None:
        """Refuse what could not be served before its body is read."""
        self._engine.status.require_serving()
        self._admission.require_room(body_bytes)

    async def find(self, request: GenerationRequest) -> tuple[Answer | None, CacheKey | None]:
        """The answer, if it is there already; else what to keep it under, for the call that makes it."""
        return None, None

    async def complete(self, request: GenerationRequest, key: CacheKey | None = None) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        slot = await self._enter(request.body, request.size, request.answers)
        try:
            answer, usage = await self._engine.complete(request)
        except asyncio.CancelledError:
            abandon()
            raise
        finally:
            slot.leave()
        if (record := current_request.get()) is not None:
            record.note(usage.prompt_tokens, usage.completion_tokens)
        return answer

    async def stream(self, request: GenerationRequest, key: CacheKey | None = None) -> RecordedStream:
        """The answer as it comes."""
        started = time.perf_counter()
        slot = await self._enter(request.body, request.size, request.answers)
        try:
            return RecordedStream(await self._engine.stream(request), started, slot.leave)
        except BaseException:
            slot.leave()
            raise

    async def relay(self, kind: RelayKind, body: dict[str, Any], size: int) -> dict[str, Any] | RelayedEvents:
        """What vLLM's own handler of another API answers, whole or as server-sent events."""
        if kind in _WITHOUT_ENGINE:
            answer = await self._engine.relay(kind, body)
            assert isinstance(answer, dict)
            return answer
        slot = await self._enter(body, size)
        try:
            answer = await self._engine.relay(kind, body)
        except BaseException:
            slot.leave()
            raise
        record = current_request.get() or RequestRecord("")
        if not isinstance(answer, dict):
            return RelayedEvents(answer, slot, record)
        slot.leave()
        note_answer(answer, record)
        return answer

    async def _enter(self, body: dict[str, Any], size: int, answers: int = 1) -> Slot:
        self._engine.status.require_serving()
        await reserve_tokens(lambda: estimate_tokens(body))
        return await self._admission.enter(size, answers, current_client.get())


class RelayedEvents:
    """Server-sent events of another API. Close it however the iteration ended."""

    def __init__(self, events: AsyncGenerator[bytes, None], slot: Slot, record: RequestRecord) -> None:
        self._events = events
        self._slot = slot
        self._record = record

    def __aiter__(self) -> AsyncIterator[bytes]:
        return noted_events(self._events, self._record)

    async def aclose(self) -> None:
        try:
            await self._events.aclose()
        finally:
            self._slot.leave()


class RecordedStream:
    """A `TokenStream` that writes its times and counts into the request's record."""

    def __init__(
        self,
        stream: TokenStream,
        started: float,
        on_end: Callable[[], None],
        counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.tokens = stream
        self._record = current_request.get() or RequestRecord(stream.id)
        self._started = started
        self._on_end = on_end
        self._counts = counts

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        record = self._record
        async for deltas in self.tokens:
            if record.time_to_first_token is None:
                record.time_to_first_token = time.perf_counter() - self._started
            yield deltas

    async def aclose(self) -> None:
        """Stop the generation if it still runs. Call it however the iteration ended."""
        counts = self._counts()
        try:
            await self.tokens.aclose()
        finally:
            self._on_end()
        if counts:
            usage = self.tokens.usage
            self._record.note(usage.prompt_tokens, usage.completion_tokens)
