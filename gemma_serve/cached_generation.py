"""`Generator` with the response cache before it: a hit needs no quota, no place in the queue, no engine."""

from __future__ import annotations

import time
from typing import Any

from .admission import Admission
from .cache import Answer, AnswerStream, CacheKey, Flight, ResponseCache, Seat, SeatStream
from .clients import current_client
from .engine.base import Engine, GenerationRequest, TokenStream
from .generation import Generator, RecordedStream
from .logs import RequestRecord, current_request
from .rate_limit import abandon, reserve_tokens
from .token_usage import estimate_tokens

_CHEAP_BODY = 65_536  # bytes


class CachedGenerator(Generator):
    """Equal questions share one generation; whoever of them is there first, and still, pays for it."""

    def __init__(self, engine: Engine, admission: Admission, cache: ResponseCache) -> None:
        super().__init__(engine, admission)
        self._cache = cache

    def require_room(self, body_bytes: int) -> None:
        """Small bodies are read even when the queue is full: their answer may be in the cache."""
        if 0 < body_bytes <= _CHEAP_BODY:
            self._engine.status.require_serving()
        else:
            super().require_room(body_bytes)

    async def complete(self, request: GenerationRequest) -> dict[str, Any]:
        record = current_request.get() or RequestRecord(request.request_id)
        found = await self._look(request, record)
        if found is None:
            return await super().complete(request)
        if isinstance(found, Answer):
            answer, pays = found, self._cache.hits_cost_tokens
        else:
            try:
                answer = await found.answer()
                pays = self._pays(found)
            finally:
                await _leave(found)
        if pays:
            record.note(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        return answer.body(request.public_id)

    async def stream(self, request: GenerationRequest) -> RecordedStream:
        started = time.perf_counter()
        record = current_request.get() or RequestRecord(request.request_id)
        found = await self._look(request, record)
        if found is None:
            return await super().stream(request)
        if isinstance(found, Answer):
            stream: TokenStream = AnswerStream(found, request.public_id)
            return RecordedStream(stream, started, _nothing, lambda: self._cache.hits_cost_tokens)
        seat = found
        stream = SeatStream(seat, request.kind, request.public_id)
        return RecordedStream(stream, started, _nothing, lambda: self._pays(seat))

    def _pays(self, seat: Seat) -> bool:
        return seat.pays or self._cache.hits_cost_tokens

    async def _look(self, request: GenerationRequest, record: RequestRecord) -> Answer | Seat | None:
        """The answer, or a place in the generation of it; None where the cache has no part."""
        self._engine.status.require_serving()
        cache = self._cache
        key = await cache.key(request, current_client.get(), self._engine.loaded())
        if key is None:
            record.cache = "bypass"
            return None
        fresh = request.cache == "refresh"
        if not fresh and not cache.under_way(key) and (answer := await cache.find(key)) is not None:
            if cache.hits_cost_tokens:
                usage = answer.usage
                await reserve_tokens(lambda: (usage.prompt_tokens, usage.completion_tokens))
            record.cache, record.cache_age = "hit", answer.age
            return answer
        return await self._seat(key, fresh, request, record)

    async def _seat(
        self, key: CacheKey, fresh: bool, request: GenerationRequest, record: RequestRecord
    ) -> Seat:
        """Where tokens may come by now."""
        reserved = False
        while True:
            flight, begins = self._cache.flight(key, fresh)
            record.cache = "coalesced" if not begins else "bypass" if fresh else "miss"
            seat = flight.seat(begins)
            try:
                if not reserved and (begins or self._cache.hits_cost_tokens):
                    await reserve_tokens(lambda: estimate_tokens(request.body))
                    reserved = True
                if begins:
                    self._cache.start(key, fresh, flight, lambda flight: self._generate(request, flight))
                await seat.begun()
            except BaseException:
                await _leave(seat)
                if flight.vacant:
                    self._cache.end(key, fresh, flight)
                raise
            if not flight.vacant:
                return seat
            await _leave(seat)

    async def _generate(self, request: GenerationRequest, flight: Flight) -> Answer:
        """In a task of its own, for the first client's account in the queue."""
        slot = await self._admission.enter(request.size, request.answers, current_client.get())
        flight.admitted = True
        try:
            if not request.body.get("stream"):
                return Answer.of_body(request.kind, *await self._engine.complete(request))
            stream = await self._engine.stream(request)
            try:
                flight.begin(stream)
                async for deltas in stream:
                    flight.add(deltas)
            finally:
                await stream.aclose()
            return Answer.of_stream(request.kind, stream, flight.deltas)
        finally:
            slot.leave()


async def _leave(seat: Seat) -> None:
    if seat.pays and seat.flight.admitted and not seat.flight.ended:
        abandon()
    await seat.leave()


def _nothing() -> None: ...
