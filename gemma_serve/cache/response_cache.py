"""`ResponseCache`: finds answers, keeps new ones, and lets equal questions share one generation."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

from ..clients import Client
from ..engine.base import GenerationRequest, LoadedModel
from ..settings import CacheSettings
from ..storage import SharedStorage
from .answer import Answer
from .flight import Flight, Seat
from .key import CacheKey, is_deterministic, key_of, tenant_of
from .memory_store import MemoryStore
from .redis_store import RedisStore
from .repeats import Repeats

OUTCOMES = ("hit", "miss", "coalesced", "bypass")
"""What the cache did for a request: `coalesced` joined another's generation, `bypass` may not be kept or did
not want to know of what is."""


class ResponseCache:
    """In `storage`, or in this process where there is none. Whatever goes wrong in it is a miss."""

    def __init__(self, settings: CacheSettings, storage: SharedStorage | None = None) -> None:
        self._settings = settings
        self.hits_cost_tokens = settings.hits_cost_tokens
        self.store: MemoryStore | RedisStore = (
            RedisStore(settings, storage) if storage else MemoryStore(settings)
        )
        self.flights: dict[tuple[CacheKey, bool], Flight] = {}
        """What is being generated, and written to Redis."""
        self.repeats = Repeats()
        self._models: dict[str, LoadedModel] = {}
        self._emptying: asyncio.Task[None] | None = None
        """Of a model's entries, that was loaded again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        """Of all requests since the start."""

    @property
    def hit_rate(self) -> float | None:
        """The share of hits among what may be kept, since the start; None before the first request."""
        asked = sum(self.outcomes[outcome] for outcome in ("hit", "miss", "coalesced"))
        return self.outcomes["hit"] / asked if asked else None

    def key(
        self, request: GenerationRequest, client: Client | None, model: LoadedModel | None
    ) -> CacheKey | None:
        """What the answer is kept under; None when it may not be kept."""
        sampled = self._settings.mode == "all"
        if model is None or request.cache == "off" or not (sampled or is_deterministic(request.body, model)):
            return None
        if (known := self._models.get(request.model)) is not model:
            self._models[request.model] = model
            if known is not None:  # it was loaded again
                self._ground(None, request.model)
                self._emptying = self.store.forget(request.model)
                self._background(self._emptying)
        return key_of(request, tenant_of(client, self._settings.shared_by), model)

    def at_hand(self, key: CacheKey) -> Answer | None:
        """An answer in memory."""
        return self.store.at_hand(key)

    def enter(self, key: CacheKey, request: GenerationRequest) -> Answer | Seat:
        """An answer in memory, or a seat in the one generation of this question.

        It must not wait between its look and its claim: of requests at once each would begin a generation.
        Those that want a fresh answer keep to themselves.
        """
        fresh = request.cache == "refresh"
        flight = self.flights.get((key, fresh))
        if flight is not None and flight.open:
            return flight.seat()
        if not fresh and (answer := self.store.at_hand(key)) is not None:
            return answer
        flight = Flight(request.kind, partial(self._land, key, fresh), self.store.epoch)
        self.flights[key, fresh] = flight
        return flight.seat(begins=True)

    async def look(self, key: CacheKey, flight: Flight) -> Answer | None:
        """For who begins: an answer that takes a wait."""
        if self._emptying is not None:
            await asyncio.shield(self._emptying)
            self._emptying = None
        found, flight.epoch = await self.store.look(key)
        return found

    def _land(self, key: CacheKey, fresh: bool, flight: Flight) -> None:
        writing = None
        if flight.answer is not None and not flight.found and flight.answer.finished:
            writing = self.store.put(key, flight.answer, flight.epoch)
        if writing is None:
            self._remove(key, fresh, flight)
        else:
            writing.add_done_callback(lambda _: self._remove(key, fresh, flight))
            self._background(writing)

    def _ground(self, tenant: str | None, model: str | None) -> None:
        """Nobody joins these any more; who sits in them goes on."""
        for (key, fresh), flight in list(self.flights.items()):
            if key.is_of(tenant, model):
                self._remove(key, fresh, flight)

    def _remove(self, key: CacheKey, fresh: bool, flight: Flight) -> None:
        """Who comes from now on begins another."""
        if self.flights.get((key, fresh)) is flight:
            del self.flights[key, fresh]

    async def clear(self, *, tenant: str | None = None, model: str | None = None) -> int:
        """Forget answers, also those under way; how many there were. Raises `StorageAway`."""
        self._ground(tenant, model)
        return await self.store.clear(tenant, model)

    def _background(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Stop what is under way."""
        for flight in list(self.flights.values()):
            await flight.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # each waits only so long for Redis
