"""Cached answers in Redis, for all servers that share it; each step is one script, and so one round trip.

A hash has the answers, two sorted sets when each was last used and when it expires, so that the limits hold
for all servers together. The oldest go when there are too many, whoever wrote them. The epoch changes when
answers are deleted: one that began before, on whichever server, is not kept. A Redis that is full may evict
any of these keys: what is left without the others is deleted with the next answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import uuid
from functools import partial
from typing import Any

from ..settings import CacheSettings
from ..storage import SharedStorage, StorageAway
from .answer import Answer
from .key import VERSION, CacheKey

logger = logging.getLogger(__name__)

_CLEAR_BATCH = 500
_BYTES_PER_SECOND = 2_000_000
"""Of the slowest line to Redis that is reckoned with: an answer that takes longer than Redis may take would
make it pass for away, for all that use it."""

_NOW = """
local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1000000
"""
_DROP = """
local function drop(field)
  local size = redis.call('HSTRLEN', KEYS[1], field)
  redis.call('HDEL', KEYS[1], field)
  redis.call('ZREM', KEYS[3], field)
  redis.call('DECRBY', KEYS[4], size)
  return redis.call('ZREM', KEYS[2], field)
end
"""
_GET = (
    _NOW
    + """
local expires = redis.call('ZSCORE', KEYS[3], ARGV[1])
local value = false
if expires and tonumber(expires) > now and redis.call('HSTRLEN', KEYS[1], ARGV[1]) <= tonumber(ARGV[2]) then
  redis.call('ZADD', KEYS[2], 'XX', now, ARGV[1])
  value = redis.call('HGET', KEYS[1], ARGV[1])
end
return {value, redis.call('GET', KEYS[5]) or ''}
"""
)
_PUT = (
    _NOW
    + _DROP
    + """
local field, value, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
if (redis.call('GET', KEYS[5]) or '') ~= ARGV[6] then
  return {0, redis.call('ZCARD', KEYS[2]), tonumber(redis.call('GET', KEYS[4]) or 0)}
end
local kept = redis.call('HLEN', KEYS[1])
if kept == 0 or kept ~= redis.call('ZCARD', KEYS[2]) or kept ~= redis.call('ZCARD', KEYS[3])
    or redis.call('EXISTS', KEYS[4]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 1000)) do drop(old) end
drop(field)
redis.call('HSET', KEYS[1], field, value)
redis.call('ZADD', KEYS[2], now, field)
redis.call('ZADD', KEYS[3], now + ttl, field)
local bytes = redis.call('INCRBY', KEYS[4], #value)
local evicted = 0
while redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[4]) or bytes > tonumber(ARGV[5]) do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then break end
  drop(oldest)
  bytes = tonumber(redis.call('GET', KEYS[4]))
  evicted = evicted + 1
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, math.ceil(ttl) + 60) end
return {evicted, redis.call('ZCARD', KEYS[2]), bytes}
"""
)
_CLEAR = (
    _DROP
    + """
local dropped = 0
for _, field in ipairs(ARGV) do dropped = dropped + drop(field) end
return dropped
"""
)


class RedisStore:
    """As `MemoryStore`; while Redis is away nothing is found or kept. What it says of itself is what Redis
    said last.
    """

    epoch = ""

    def __init__(self, settings: CacheSettings, storage: SharedStorage) -> None:
        self.entries = self.size = self.evictions = 0
        self._storage = storage
        self._redis: Any = storage.redis  # redis-py annotates its methods for both kinds of client
        self._ttl, self._entries = settings.ttl_seconds, settings.max_entries
        self._most = settings.max_bytes
        self._largest = min(self._most, int(storage.timeout * _BYTES_PER_SECOND))
        """Of one answer, in bytes."""
        start = f"{storage.prefix}:cache:{VERSION}"
        self._used, self._epoch = f"{start}:used", f"{start}:epoch"
        self._keys = [f"{start}:answers", self._used, f"{start}:expires", f"{start}:bytes", self._epoch]
        self._get, self._put, self._clear = map(self._redis.register_script, (_GET, _PUT, _CLEAR))

    def at_hand(self, key: CacheKey) -> Answer | None:
        return None

    async def look(self, key: CacheKey) -> tuple[Answer | None, str]:
        try:
            found, epoch = await self._storage.call(
                lambda: self._get(self._keys, [_field(key), self._largest])
            )
            return None if found is None else Answer.decode(found), epoch.decode()
        except StorageAway:  # logged there
            return None, ""
        except ValueError:
            logger.warning("An entry of the response cache cannot be read; it is made again")
            return None, epoch.decode()

    def put(self, key: CacheKey, answer: Answer, epoch: str) -> asyncio.Task[None] | None:
        """Nobody waits for it but who asks the same meanwhile."""
        value = answer.encode()
        if len(value) > self._largest:
            return None
        arguments: list[Any] = [_field(key), value, self._ttl, self._entries, self._most, epoch]
        return asyncio.create_task(self._write(arguments))

    async def _write(self, arguments: list[Any]) -> None:
        with contextlib.suppress(StorageAway):
            evicted, self.entries, self.size = await self._storage.call(
                lambda: self._put(self._keys, arguments)
            )
            self.evictions += evicted

    async def clear(self, tenant: str | None, model: str | None) -> int:
        """Also of what other servers are about to put. Raises `StorageAway`."""
        epoch = uuid.uuid4().hex
        await self._storage.call(lambda: self._redis.set(self._epoch, epoch, ex=math.ceil(self._ttl) + 60))
        parts = ["*" if name is None else _short(name) for name in (tenant, model)]
        cursor, count = 0, 0
        while True:
            scan = partial(self._redis.zscan, self._used, cursor, ":".join([*parts, "*"]), _CLEAR_BATCH)
            cursor, found = await self._storage.call(scan)
            if fields := [field for field, _ in found]:
                count += await self._storage.call(partial(self._clear, self._keys, fields))
            if not cursor:
                return count

    def forget(self, model: str) -> asyncio.Task[None]:
        """As `clear`; nobody waits for it."""

        async def work() -> None:
            with contextlib.suppress(StorageAway):
                await self.clear(None, model)

        return asyncio.create_task(work())


def _field(key: CacheKey) -> str:
    return f"{_short(key.tenant)}:{_short(key.model)}:{key.digest.hex()}"


def _short(name: str) -> str:
    """Of letters and digits, so that it is no pattern."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
