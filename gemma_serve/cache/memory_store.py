"""Cached answers in this process."""

from __future__ import annotations

from cachetools import TTLCache

from ..settings import CacheSettings
from .key import CacheKey


class MemoryStore:
    """Encoded answers by key; the least recently used go first when there are too many, or too many bytes."""

    def __init__(self, settings: CacheSettings) -> None:
        self._entries = settings.max_entries
        self._largest = settings.max_bytes
        self._kept = _Counted(settings.max_bytes, settings.ttl_seconds, getsizeof=len)

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

    async def get(self, key: CacheKey) -> bytes | None:
        return self._kept.get(key)

    async def put(self, key: CacheKey, value: bytes) -> None:
        if len(value) > self._largest:
            return
        self._kept.pop(key, None)
        while len(self._kept) >= self._entries:
            self._kept.popitem()
        self._kept[key] = value

    async def clear(self, tenant: str | None, model: str | None) -> int:
        """How many there were; None is all of them."""
        found = [key for key in self._kept if key.is_of(tenant, model)]
        for key in found:
            self._kept.pop(key, None)
        return len(found)


class _Counted(TTLCache[CacheKey, bytes]):
    evictions = 0

    def popitem(self) -> tuple[CacheKey, bytes]:
        self.evictions += 1
        return super().popitem()
