"""`ResponseCache`: finds answers, keeps new ones, and lets equal questions share one generation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from ..clients import Client
from ..engine.base import GenerationRequest, LoadedModel
from ..settings import CacheSettings
from ..storage import SharedStorage, StorageAway
from .answer import Answer
from .flight import Flight
from .key import CacheKey, is_deterministic, key_of, tenant_of
from .memory_store import MemoryStore
from .redis_store import RedisStore

logger = logging.getLogger(__name__)


class ResponseCache:
    """In `storage`, or in this process where there is none. Whatever goes wrong in it is a miss."""

    def __init__(self, settings: CacheSettings, storage: SharedStorage | None = None) -> None:
        self._settings = settings
        self.hits_cost_tokens = settings.hits_cost_tokens
        self.store: MemoryStore | RedisStore = (
            RedisStore(settings, storage) if storage else MemoryStore(settings)
        )
        self._flights: dict[tuple[CacheKey, bool], Flight] = {}
        self._models: dict[str, LoadedModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.hits = 0
        self.misses = 0
        self.coalesced = 0
        """Requests that joined another's generation."""
        self.bypassed = 0
        """Requests that may not be cached, or did not want to be."""

    @property
    def evictions(self) -> int:
        """Answers that had to make room, not those that expired."""
        return self.store.evictions

    @property
    def entries(self) -> int:
        return self.store.entries

    @property
    def size(self) -> int:
        """Of all answers, in bytes."""
        return self.store.size

    async def key(
        self, request: GenerationRequest, client: Client | None, model: LoadedModel | None
    ) -> CacheKey | None:
        """What the answer is kept under; None when it may not be kept."""
        sampled = self._settings.mode == "all"
        if model is None or request.cache == "off" or not (sampled or is_deterministic(request.body, model)):
            self.bypassed += 1
            return None
        if (known := self._models.get(request.model)) is not model:
            self._models[request.model] = model
            if known is not None:  # it was loaded again
                with contextlib.suppress(StorageAway):
                    await self.clear(model=request.model)
        return key_of(request, tenant_of(client, self._settings.shared_by), model)

    async def find(self, key: CacheKey) -> Answer | None:
        try:
            if (data := await self.store.get(key)) is None:
                return None
            answer = Answer.decode(data)
        except StorageAway:
            return None  # logged there
        except ValueError:
            logger.warning("An entry of the response cache cannot be read; it is made again")
            return None
        self.hits += 1
        return answer

    def under_way(self, key: CacheKey) -> bool:
        """Is somebody's generation of it to be joined?"""
        return (flight := self._flights.get((key, False))) is not None and flight.open

    def flight(self, key: CacheKey, fresh: bool) -> tuple[Flight, bool]:
        """The generation of this question, and whether it is to be begun. Fresh ones keep to themselves."""
        flight = self._flights.get((key, fresh))
        if flight is not None and flight.open:
            self.coalesced += 1
            return flight, False
        self.misses += 1
        self._flights[key, fresh] = flight = Flight()
        return flight, True

    def start(
        self, key: CacheKey, fresh: bool, flight: Flight, work: Callable[[Flight], Awaitable[Answer]]
    ) -> None:
        task = asyncio.create_task(self._fly(key, flight, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: self.end(key, fresh, flight))
        flight.task = task

    def end(self, key: CacheKey, fresh: bool, flight: Flight) -> None:
        """Who comes from now on begins another."""
        if self._flights.get((key, fresh)) is flight:
            del self._flights[key, fresh]

    async def _fly(self, key: CacheKey, flight: Flight, work: Callable[[Flight], Awaitable[Answer]]) -> None:
        try:
            answer = await work(flight)
            flight.end(answer)
            if flight.keep and answer.is_finished():
                await self._keep(key, answer)
        except asyncio.CancelledError as error:
            flight.end(error)
            raise
        except Exception as error:
            flight.end(error)
            if flight.error is not error:
                logger.exception("A shared generation failed")

    async def _keep(self, key: CacheKey, answer: Answer) -> None:
        with contextlib.suppress(StorageAway):
            await self.store.put(key, answer.encode())

    async def clear(self, *, tenant: str | None = None, model: str | None = None) -> int:
        """Forget answers, also those under way; how many there were. Raises `StorageAway`."""
        for (key, fresh), flight in list(self._flights.items()):
            if key.is_of(tenant, model):
                flight.keep = False
                self.end(key, fresh, flight)
        return await self.store.clear(tenant, model)

    async def aclose(self) -> None:
        """Stop what is under way."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
