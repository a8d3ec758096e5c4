"""`Generator` with the response cache before it: a hit needs no quota, no place in the queue, no engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from .admission import Admission
from .cache import (
    SHARED,
    Answer,
    AnswerHead,
    CacheKey,
    Flight,
    Origin,
    Repeat,
    RepeatedHit,
    ResponseCache,
    Seat,
    SeatHead,
    put_pieces,
)
from .clients import current_client
from .engine.base import Engine, GenerationRequest, LoadedModel, Sink, Usage
from .errors import RateLimited
from .generation import Delivery, Generation, Generator
from .logs import RequestRecord, current_request
from .metrics import Metrics
from .models import Models
from .rate_limit import keep_reserved, reserve_tokens
from .token_usage import estimate_tokens
from .tracing import phase

_CHEAP_BODY = 65_536  # bytes


class CachedGenerator(Generator):
    """Equal questions share one generation; whoever of them is there first, and still, pays for it."""

    def __init__(
        self, engine: Engine, models: Models, admission: Admission, metrics: Metrics, cache: ResponseCache
    ) -> None:
        super().__init__(engine, models, admission, metrics)
        self.cache = cache

    def require_room(self, body_bytes: int) -> None:
        """Small bodies are read even when the queue is full: their answer may be in the cache."""
        if 0 < body_bytes <= _CHEAP_BODY:
            self._models.require_open()
        else:
            super().require_room(body_bytes)

    def loaded(self, model: str) -> LoadedModel | None:
        """None where its answer has to wait for a load. Raises `EngineNotReady`."""
        self._models.require_open()
        return self._models.loaded(model)

    def repeated(self, origin: Origin) -> RepeatedHit | None:
        repeat = self.cache.repeats.find(current_client.get(), origin)
        if repeat is None:
            return None
        started = time.perf_counter()
        model = self._models.resolve(repeat.model)  # names may mean another model by now, or be forbidden
        if model != repeat.key.model or self.loaded(model) is not repeat.loaded:
            return None
        if (answer := self.cache.at_hand(repeat.key)) is None:
            return None
        record = current_request.get() or RequestRecord(uuid.uuid4().hex)
        record.model = model
        self.note_hit(answer, record)
        phase("cache", started)
        return RepeatedHit(answer, repeat.request_id or record.id, repeat.form)

    def note_hit(self, answer: Answer, record: RequestRecord) -> None:
        record.cache, record.cache_age = "hit", answer.age
        self.cache.outcomes["hit"] += 1

    def prepare(self, request: GenerationRequest) -> Generation:
        cache, loaded = self.cache, self.loaded(request.model)
        key = cache.key(request, current_client.get(), loaded)
        if loaded is not None and key is not None:
            return CachedGeneration(self, request, key, loaded)
        cache.outcomes["bypass"] += 1
        _record(request).cache = "bypass"
        return super().prepare(request)

    async def stream(self, request: GenerationRequest) -> Delivery:
        return await self.prepare(request).stream()


class CachedGeneration(Generation):
    _generator: CachedGenerator

    def __init__(
        self, generator: CachedGenerator, request: GenerationRequest, key: CacheKey, loaded: LoadedModel
    ) -> None:
        super().__init__(generator, request)
        self._cache = generator.cache
        self._key = key
        self._loaded = loaded

    def found(self, origin: Origin, form: Any) -> Answer | None:
        request, cache = self._request, self._cache
        if cache.hits_cost_tokens or request.cache == "refresh":
            return None  # `complete` and `stream` see to it
        started = time.perf_counter()
        if (answer := cache.at_hand(self._key)) is not None:
            self._hit(answer)
            asked = request.body.get("model"), request.body.get("request_id")
            cache.repeats.keep(current_client.get(), origin, Repeat(self._key, self._loaded, *asked, form))
            phase("cache", started)
        return answer

    async def complete(self) -> bytes:
        started = time.perf_counter()
        entered = await self._enter()
        phase("cache", started)
        if isinstance(entered, Answer):
            return entered.body(self._request.public_id)
        seat = entered
        try:
            if seat.begins:
                self._begin(seat.flight, self._complete)
            answer = await seat.flight.landed()
            if not seat.begins and self.counts(seat):
                self.note(answer.usage)
        finally:
            await self.leave(seat)
        return answer.body(self._request.public_id)

    async def stream(self) -> Delivery:
        started = time.perf_counter()
        entered = await self._enter()
        phase("cache", started)
        if isinstance(entered, Answer):
            return FoundStream(entered, self._request.public_id)
        seat = entered
        try:
            if seat.begins:
                self._begin(seat.flight, self._stream)
            return SharedStream(SeatHead(seat.flight, self._request.public_id), started, self, seat)
        except BaseException:
            await self.leave(seat)
            raise

    def _begin(self, flight: Flight, work: Callable[[Flight], Coroutine[Any, Any, Answer]]) -> None:
        async def fly() -> None:
            try:
                flight.end(await work(flight))
            except BaseException as error:
                # One client's own limit is no answer to another; for the rest, a failure is told to all.
                if isinstance(error, RateLimited) and self._key.tenant == SHARED:
                    flight.vacate(error)
                else:
                    flight.end(error)

        flight.task = asyncio.create_task(fly())

    async def _complete(self, flight: Flight) -> Answer:
        return Answer.of_body(self._request.kind, await self._generator.complete(self._request))

    async def _stream(self, flight: Flight) -> Answer:
        stream = await self._generator.generate(self._request)
        try:
            flight.on_first_token = stream.note_first_token
            flight.begin(stream.tokens)
            await stream.feed(flight)
        finally:
            await stream.aclose()
        return Answer.of_stream(self._request.kind, stream.tokens, flight.pieces)

    async def _enter(self) -> Answer | Seat:
        """The answer; or a seat in the generation of it: to be begun, or one where tokens may come by now."""
        cache, request, record = self._cache, self._request, _record(self._request)
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
                await self.leave(seat)
                raise
            await seat.leave()  # of what will not begin

    async def leave(self, seat: Seat) -> None:
        if not (seat.left or seat.begins or seat.flight.ended) and seat.alone:
            # Whoever began it has left without paying.
            usage = seat.flight.usage
            prompt, _ = estimate_tokens(self._request.body)
            self.note(Usage(usage.prompt_tokens or prompt, usage.completion_tokens))
        if seat.begins and not (seat.left or seat.flight.ended or seat.alone or seat.flight.task is None):
            keep_reserved(seat.flight.task)  # or any number could be begun with the same tokens
        await seat.leave()

    def counts(self, seat: Seat) -> bool:
        return seat.pays or self._cache.hits_cost_tokens

    async def _charge(self, answer: Answer) -> None:
        if self._cache.hits_cost_tokens:
            usage = answer.usage
            await reserve_tokens(lambda: (usage.prompt_tokens, usage.completion_tokens))
            self.note(usage)

    def _hit(self, answer: Answer) -> Answer:
        self._generator.note_hit(answer, _record(self._request))
        return answer

    def note(self, usage: Usage) -> None:
        record = _record(self._request)
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens


class FoundStream:
    """The `Delivery` of an answer that is there."""

    def __init__(self, answer: Answer, request_id: str) -> None:
        self.tokens = AnswerHead(answer, request_id)
        self._answer = answer

    async def feed(self, sink: Sink) -> None:
        put_pieces(sink, self._answer.pieces())
        if not sink.flush():
            await sink.drain()

    def note_first_token(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


class SharedStream:
    """The `Delivery` of a generation that others may share."""

    def __init__(self, tokens: SeatHead, started: float, generation: CachedGeneration, seat: Seat) -> None:
        self.tokens = tokens
        self._started = started
        self._generation = generation
        self._seat = seat
        self._record = current_request.get()  # tokens come in the context of who began

    async def feed(self, sink: Sink) -> None:
        await self._seat.feed(sink)

    def note_first_token(self) -> None:
        if not self._seat.begins and self._record is not None:
            self._record.time_to_first_token = time.perf_counter() - self._started

    async def aclose(self) -> None:
        seat = self._seat
        if not seat.begins and self._generation.counts(seat):
            self._generation.note(seat.flight.usage)
        await self._generation.leave(seat)


def _record(request: GenerationRequest) -> RequestRecord:
    return current_request.get() or RequestRecord(request.request_id)
