"""Cached answers in this process."""

from __future__ import annotations

import time
from collections import OrderedDict

from ..settings import CacheSettings
from .answer import Answer
from .key import CacheKey


class MemoryStore:
    """Answers by key; the least recently used go first when there are too many, or too many bytes.

    Not cachetools' `TTLCache`: its look-ups took a tenth of a hit's time.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._ttl, self._most, self._largest = settings.ttl_seconds, settings.max_entries, settings.max_bytes
        self._kept: OrderedDict[CacheKey, tuple[float, Answer]] = OrderedDict()
        self._emptied = 0
        self.size = 0
        """Of all answers, in bytes."""
        self.evictions = 0

    @property
    def entries(self) -> int:
        return len(self._kept)

    @property
    def epoch(self) -> str:
        """Another one after each `clear`."""
        return str(self._emptied)

    def at_hand(self, key: CacheKey) -> Answer | None:
        """An answer that is here, without a wait."""
        if (entry := self._kept.get(key)) is None:
            return None
        expires, answer = entry
        if expires <= time.monotonic():
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return answer

    async def look(self, key: CacheKey) -> tuple[Answer | None, str]:
        """An answer that is elsewhere, and the epoch."""
        return None, self.epoch

    def put(self, key: CacheKey, answer: Answer, epoch: str) -> None:
        if answer.size > self._largest or epoch != self.epoch:
            return
        now = time.monotonic()
        if key in self._kept:
            self._drop(key)
        self._kept[key] = now + self._ttl, answer
        self.size += answer.size
        while len(self._kept) > self._most or self.size > self._largest:
            oldest, (expires, _) = next(iter(self._kept.items()))
            self._drop(oldest)
            self.evictions += expires > now

    async def clear(self, tenant: str | None, model: str | None) -> int:
        """How many there were; None is all of them."""
        self._emptied += 1
        found = [key for key in self._kept if key.is_of(tenant, model)]
        for key in found:
            self._drop(key)
        return len(found)

    def forget(self, model: str) -> None:
        """As `clear`, at once."""
        self._emptied += 1
        for key in [key for key in self._kept if key.model == model]:
            self._drop(key)

    def _drop(self, key: CacheKey) -> None:
        _, answer = self._kept.pop(key)
        self.size -= answer.size
