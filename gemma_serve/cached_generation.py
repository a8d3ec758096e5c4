"""`Generator` with the response cache before it: a hit needs no quota, no place in the queue, no engine."""

from __future__ import annotations

import time
from typing import Any

from .admission import Admission
from .cache import Answer, CacheKey, Flight, ResponseCache, Seat, SeatStream
from .clients import current_client
from .engine.base import Engine, GenerationRequest
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

    async def find(self, request: GenerationRequest) -> tuple[Answer | None, CacheKey | None]:
        self._engine.status.require_serving()
        cache, record = self._cache, _record(request)
        key = await cache.key(request, current_client.get(), self._engine.loaded())
        if key is None:
            record.cache = "bypass"
            return None, None
        if request.cache == "refresh" or cache.under_way(key) or (answer := await cache.find(key)) is None:
            return None, key
        if cache.hits_cost_tokens:
            usage = answer.usage
            await reserve_tokens(lambda: (usage.prompt_tokens, usage.completion_tokens))
            record.note(usage.prompt_tokens, usage.completion_tokens)
        record.cache, record.cache_age = "hit", answer.age
        return answer, None

    async def complete(self, request: GenerationRequest, key: CacheKey | None = None) -> dict[str, Any]:
        if key is None:
            return await super().complete(request)
        seat = await self._seat(key, request)
        try:
            answer = await seat.answer()
            if self._counts(seat):
                _record(request).note(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        finally:
            await _leave(seat)
        return answer.body(request.public_id)

    async def stream(self, request: GenerationRequest, key: CacheKey | None = None) -> RecordedStream:
        if key is None:
            return await super().stream(request)
        started = time.perf_counter()
        seat = await self._seat(key, request)
        stream = SeatStream(seat, request.kind, request.public_id)
        return RecordedStream(stream, started, lambda: None, lambda: self._counts(seat))

    def _counts(self, seat: Seat) -> bool:
        return seat.pays or self._cache.hits_cost_tokens

    async def _seat(self, key: CacheKey, request: GenerationRequest) -> Seat:
        """In the one generation of this question, where tokens may come by now."""
        fresh, reserved, record = request.cache == "refresh", False, _record(request)
        while True:
            flight, begins = self._cache.flight(key, fresh)
            record.cache = "coalesced" if not begins else "bypass" if fresh else "miss"
            seat = flight.seat(begins)
            try:
                # Another may have ended it since `find`.
                if begins and not fresh and (answer := await self._cache.find(key)) is not None:
                    record.cache, record.cache_age = "hit", answer.age
                    flight.end(answer, paid=True)
                    self._cache.end(key, fresh, flight)
                    return seat
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


def _record(request: GenerationRequest) -> RequestRecord:
    return current_request.get() or RequestRecord(request.request_id)
