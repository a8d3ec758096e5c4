"""Cached answers in this process."""

from __future__ import annotations

from operator import attrgetter

from cachetools import TTLCache

from ..settings import CacheSettings
from .answer import Answer
from .key import CacheKey


class MemoryStore:
    """Answers by key; the least recently used go first when there are too many, or too many bytes."""

    def __init__(self, settings: CacheSettings) -> None:
        self._entries = settings.max_entries
        self._largest = settings.max_bytes
        self._kept = _Counted(settings.max_bytes, settings.ttl_seconds, getsizeof=attrgetter("size"))
        self._emptied = 0

    @property
    def evictions(self) -> int:
        return self._kept.evictions

    @property
    def entries(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Of all answers, in bytes."""
        return int(self._kept.currsize)

    @property
    def epoch(self) -> str:
        """Another one after each `clear`."""
        return str(self._emptied)

    def at_hand(self, key: CacheKey) -> Answer | None:
        """An answer that is here, without a wait."""
        return self._kept.get(key)

    async def look(self, key: CacheKey) -> tuple[Answer | None, str]:
        """An answer that is elsewhere, and the epoch."""
        return None, self.epoch

    def put(self, key: CacheKey, answer: Answer, epoch: str) -> None:
        if answer.size > self._largest or epoch != self.epoch:
            return
        if key not in self._kept:
            while len(self._kept) >= self._entries:
                self._kept.popitem()
        self._kept[key] = answer

    async def clear(self, tenant: str | None, model: str | None) -> int:
        """How many there were; None is all of them."""
        return self._drop(tenant, model)

    def forget(self, model: str) -> None:
        """As `clear`, at once."""
        self._drop(None, model)

    def _drop(self, tenant: str | None, model: str | None) -> int:
        self._emptied += 1
        found = [key for key in self._kept if key.is_of(tenant, model)]
        for key in found:
            self._kept.pop(key, None)
        return len(found)


class _Counted(TTLCache[CacheKey, Answer]):
    evictions = 0

    def popitem(self) -> tuple[CacheKey, Answer]:
        self.evictions += 1
        return super().popitem()
