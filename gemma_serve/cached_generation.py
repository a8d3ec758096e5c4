"""`Generator` with the response cache before it: a hit needs no quota, no place in the queue, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .admission import Admission
from .cache import SHARED, Answer, AnswerStream, CacheKey, Flight, ResponseCache, Seat, SeatStream
from .clients import current_client
from .engine.base import Engine, GenerationRequest, LoadedModel, TokenStream
from .errors import RateLimited
from .generation import Generation, Generator
from .logs import RequestRecord, current_request
from .metrics import Metrics
from .rate_limit import reserve_tokens
from .token_usage import estimate_tokens

T = TypeVar("T")

_CHEAP_BODY = 65_536  # bytes


class CachedGenerator(Generator):
    """Equal questions share one generation; whoever of them is there first, and still, pays for it."""

    def __init__(self, engine: Engine, admission: Admission, metrics: Metrics, cache: ResponseCache) -> None:
        super().__init__(engine, admission, metrics)
        self.cache = cache

    def require_room(self, body_bytes: int) -> None:
        """Small bodies are read even when the queue is full: their answer may be in the cache."""
        if 0 < body_bytes <= _CHEAP_BODY:
            self._engine.status.require_serving()
        else:
            super().require_room(body_bytes)

    def loaded(self) -> LoadedModel | None:
        """Raises `EngineNotReady`."""
        self._engine.status.require_serving()
        return self._engine.loaded()

    def prepare(self, request: GenerationRequest) -> Generation:
        cache = self.cache
        key = cache.key(request, current_client.get(), self.loaded())
        if key is not None:
            return CachedGeneration(self, request, cache, key)
        cache.outcomes["bypass"] += 1
        _record(request).cache = "bypass"
        return super().prepare(request)


class CachedGeneration(Generation):
    def __init__(
        self, generator: Generator, request: GenerationRequest, cache: ResponseCache, key: CacheKey
    ) -> None:
        super().__init__(generator, request)
        self._cache = cache
        self._key = key

    def found(self) -> Answer | None:
        if self._cache.hits_cost_tokens or self.request.cache == "refresh":
            return None  # `complete` and `deliver` see to it
        if (answer := self._cache.at_hand(self._key)) is not None:
            self._hit(answer)
        return answer

    async def complete(self) -> bytes:
        entered = await self._enter()
        if isinstance(entered, Answer):
            return entered.body(self.request.public_id)
        seat = entered
        try:
            if seat.begins:
                seat.flight.work(asyncio.create_task(self._complete(seat.flight)))
            answer = await seat.answer()
            if not seat.begins and self._counts(seat):
                self._note(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        finally:
            await self._leave(seat)
        return answer.body(self.request.public_id)

    async def deliver(self, consume: Callable[[TokenStream], Awaitable[T]]) -> T:
        entered = await self._enter()
        if isinstance(entered, Answer):
            return await consume(AnswerStream(entered, self.request.public_id))
        return await (self._lead if entered.begins else self._follow)(entered, consume)

    async def _lead(self, seat: Seat, consume: Callable[[TokenStream], Awaitable[T]]) -> T:
        flight = seat.flight
        task = asyncio.create_task(self._deliver(seat, consume))
        flight.work(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and flight.error is not None:
                raise flight.error from None  # it is the server that ends
            raise
        finally:
            await self._leave(seat)
            # The engine takes a cancellation that reaches it for the generation's. So where others wait and
            # no task reads in this one's place, this one goes on for them, and is cancelled at the end.
            if flight.ended or flight.taken_over_at is not None:
                task.cancel()

    async def _follow(self, seat: Seat, consume: Callable[[TokenStream], Awaitable[T]]) -> T:
        try:
            return await consume(SeatStream(seat, self.request.public_id))
        finally:
            if self._counts(seat):
                usage = seat.flight.usage
                self._note(usage.prompt_tokens, usage.completion_tokens)
            await self._leave(seat)

    async def _enter(self) -> Answer | Seat:
        """The answer; or a seat in the generation of it: to be begun, or one where tokens may come by now."""
        cache, request, record = self._cache, self.request, _record(self.request)
        while True:
            entered = cache.enter(self._key, request)
            if isinstance(entered, Answer):
                await self._charge(entered)
                return self._hit(entered)
            seat = entered
            try:
                if seat.begins:
                    answer = await cache.look(self._key, seat.flight)
                    if answer is not None and request.cache != "refresh":
                        seat.flight.end(answer, found=True)
                        await self._charge(answer)
                        return self._hit(answer)
                    record.cache = "bypass" if request.cache == "refresh" else "miss"
                    cache.outcomes[record.cache] += 1
                    return seat
                if cache.hits_cost_tokens:
                    await reserve_tokens(lambda: estimate_tokens(request.body))
                record.cache = "coalesced"
                await seat.ready()
                if seat.flight.found and seat.flight.answer is not None:
                    self._hit(seat.flight.answer)
                    return seat
                if not seat.flight.vacant:
                    cache.outcomes["coalesced"] += 1
                    return seat
            except BaseException:
                await self._leave(seat)
                raise
            await seat.leave()  # of what will not begin

    async def _complete(self, flight: Flight) -> None:
        try:
            body = await self._generator.complete(self.request)
            flight.end(Answer.of_body(self.request.kind, body))
        except BaseException as error:
            self._failed(flight, error)
            raise

    async def _deliver(self, seat: Seat, consume: Callable[[TokenStream], Awaitable[T]]) -> T:
        """In a task of its own, which may outlive the client."""
        flight = seat.flight
        try:
            flight.begin(await self._generator.stream(self.request))
        except BaseException as error:
            self._failed(flight, error)
            raise
        try:
            if seat.left:
                raise asyncio.CancelledError
            return await consume(SeatStream(seat, self.request.public_id))
        finally:
            if seat.left:
                flight.read_on()
            elif not flight.ended:
                await self._leave(seat)
            await flight.put_down()

    def _failed(self, flight: Flight, error: BaseException) -> None:
        """One client's own limit is no answer to another; for the rest, a failure is told to all who wait."""
        if isinstance(error, RateLimited) and self._key.tenant == SHARED:
            flight.vacate(error)
        else:
            flight.end(error)

    async def _leave(self, seat: Seat) -> None:
        if not (seat.left or seat.begins or seat.flight.ended) and seat.alone:
            # Whoever began it has left without paying.
            usage = seat.flight.usage
            prompt, _ = estimate_tokens(self.request.body)
            self._note(usage.prompt_tokens or prompt, usage.completion_tokens)
        await seat.leave()

    def _counts(self, seat: Seat) -> bool:
        return seat.pays or self._cache.hits_cost_tokens

    async def _charge(self, answer: Answer) -> None:
        if self._cache.hits_cost_tokens:
            usage = answer.usage
            await reserve_tokens(lambda: (usage.prompt_tokens, usage.completion_tokens))
            self._note(usage.prompt_tokens, usage.completion_tokens)

    def _hit(self, answer: Answer) -> Answer:
        record = _record(self.request)
        record.cache, record.cache_age = "hit", answer.age
        self._cache.outcomes["hit"] += 1
        return answer

    def _note(self, prompt_tokens: int, completion_tokens: int) -> None:
        record = _record(self.request)
        record.prompt_tokens, record.completion_tokens = prompt_tokens, completion_tokens


def _record(request: GenerationRequest) -> RequestRecord:
    return current_request.get() or RequestRecord(request.request_id)
