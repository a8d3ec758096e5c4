"""As `quotas.py`, counted in Redis for all servers together; each step is one script, and so one round trip.

A slot in flight is a lease that its server renews, as is a reservation of the day's tokens: those of a server
that was killed, or never heard of them, end by themselves. A minute's tokens come back in any case. redis-py
asks again when a connection breaks, though only the answer may be lost: what counts for good counts once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from ..clients import Client
from ..storage import SharedStorage
from .quotas import DAY, USAGE_DAYS, DayUsage, Entry, Reservation, date_of, today, until_tomorrow

LEASE_SECONDS = 60

# The bucket's level now, by Redis's clock, which is the same for all servers.
_LEVEL = """
local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1000000
local function level(key, capacity)
  local kept = redis.call('HMGET', key, 'level', 'at')
  if not kept[1] then return capacity end
  return math.min(capacity, tonumber(kept[1]) + (now - tonumber(kept[2])) * capacity / 60)
end
local function keep(key, value)
  redis.call('HSET', key, 'level', tostring(value), 'at', tostring(now))
  redis.call('EXPIRE', key, 3600)
end
"""

_ENTER = (
    _LEVEL
    + """
local most, slot, lease, capacity = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local left = tostring(level(KEYS[2], capacity))
local others = redis.call('ZCARD', KEYS[1]) - (redis.call('ZSCORE', KEYS[1], slot) and 1 or 0)
if most > 0 and others >= most then return {0, left} end
redis.call('ZADD', KEYS[1], now + lease, slot)
redis.call('EXPIRE', KEYS[1], 2 * lease)
return {1, left}
"""
)

# `key` has the reservations of a client's day by their ends: each is a name, a colon and its tokens.
_RELEASE = """
local function release(key, day, field, reservation)
  if redis.call('ZREM', key, reservation) == 1 then
    redis.call('HINCRBY', day, 'reserved:' .. field, -tonumber(string.match(reservation, '%d+$')))
  end
end
"""

_RESERVE = (
    _LEVEL
    + _RELEASE
    + """
local capacity, tokens, daily, field = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local reservation = ARGV[6]
local left = level(KEYS[1], capacity)
if capacity > 0 and left < tokens then
  return {'minute', tostring((tokens - left) * 60 / capacity), tostring(left)}
end
if daily > 0 then
  for _, lost in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
    release(KEYS[3], KEYS[2], field, lost)
  end
  release(KEYS[3], KEYS[2], field, reservation)  -- of the same question, asked before
  local used = 0
  for _, part in ipairs({'prompt:', 'completion:', 'reserved:'}) do
    used = used + tonumber(redis.call('HGET', KEYS[2], part .. field) or 0)
  end
  if used + tokens > daily then return {'day', '0', tostring(left)} end
  redis.call('HINCRBY', KEYS[2], 'reserved:' .. field, tokens)
  redis.call('EXPIRE', KEYS[2], ARGV[5])
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[7]), reservation)
  redis.call('EXPIRE', KEYS[3], ARGV[8])
end
if capacity > 0 then keep(KEYS[1], left - tokens) end
return {'', '0', tostring(left - tokens)}
"""
)

_SETTLE = (
    _LEVEL
    + _RELEASE
    + """
local slot, capacity, reserved = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local prompt, completion, field = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
if not redis.call('SET', KEYS[5], 1, 'NX', 'EX', 60) then return end  -- done before
redis.call('ZREM', KEYS[1], slot)
if capacity > 0 and reserved ~= prompt + completion then
  keep(KEYS[2], math.min(capacity, level(KEYS[2], capacity) + reserved - prompt - completion))
end
for i = 8, #ARGV do release(KEYS[4], KEYS[3], field, ARGV[i]) end
redis.call('HINCRBY', KEYS[3], 'requests:' .. field, 1)
if prompt > 0 then redis.call('HINCRBY', KEYS[3], 'prompt:' .. field, prompt) end
if completion > 0 then redis.call('HINCRBY', KEYS[3], 'completion:' .. field, completion) end
redis.call('EXPIRE', KEYS[3], ARGV[7])
"""
)

_RENEW = """
local t = redis.call('TIME')
local ends = tonumber(t[1]) + tonumber(ARGV[1])
redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[2])
redis.call('EXPIRE', KEYS[1], 2 * ARGV[1])
for i = 3, #ARGV do redis.call('ZADD', KEYS[2], 'XX', ends, ARGV[i]) end
"""

_RESERVED_SECONDS = 2 * DAY  # longer than the day that they count in
_KEEP_SECONDS = USAGE_DAYS * DAY
_NAMELESS = "ip"


class RedisQuotas:
    def __init__(self, storage: SharedStorage) -> None:
        self._storage = storage
        script = storage.redis.register_script
        self._enter, self._reserve = script(_ENTER), script(_RESERVE)
        self._settle, self._renew = script(_SETTLE), script(_RENEW)

    async def enter(self, client: Client, slot: str) -> Entry:
        keys = [self._slots(client), self._bucket(client)]
        arguments = [client.quotas.in_flight, slot, LEASE_SECONDS, client.quotas.tokens_per_minute]
        admitted, left = await self._run(self._enter, keys, arguments)
        return Entry(bool(admitted), float(left))

    async def reserve(self, client: Client, day: int, tokens: int, name: str) -> Reservation:
        quotas = client.quotas
        keys = [self._bucket(client), self._day(day), self._reserved(client, day)]
        arguments = [quotas.tokens_per_minute, tokens, quotas.tokens_per_day, _field(client), _KEEP_SECONDS]
        arguments += [f"{name}:{tokens}", LEASE_SECONDS, _RESERVED_SECONDS]
        short_of, wait, left = await self._run(self._reserve, keys, arguments)
        if short_of == b"day":
            return Reservation("day", until_tomorrow(), float(left))
        return Reservation("minute" if short_of else None, float(wait), float(left))

    async def settle(
        self,
        client: Client,
        slot: str | None,
        day: int,
        reserved: Mapping[str, int],
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        keys = [self._slots(client), self._bucket(client), self._day(day), self._reserved(client, day)]
        keys.append(f"{self._storage.prefix}:settled:{uuid.uuid4().hex}")
        counts = [sum(reserved.values()), prompt_tokens, completion_tokens]
        arguments = [slot or "", client.quotas.tokens_per_minute, *counts, _field(client), _KEEP_SECONDS]
        await self._run(self._settle, keys, [*arguments, *_members(reserved)])

    async def renew(self, client: Client, slot: str | None, day: int, reserved: Mapping[str, int]) -> None:
        keys = [self._slots(client), self._reserved(client, day)]
        await self._run(self._renew, keys, [LEASE_SECONDS, slot or "", *_members(reserved)])

    async def usage(self, days: int) -> list[DayUsage]:
        last = today()
        rows = []
        for day in range(last - days + 1, last + 1):
            counts: dict[str | None, dict[str, int]] = {}
            for name, count in (await self._all(self._day(day))).items():
                what, _, field = name.decode().partition(":")
                kind, _, client = field.partition(":")
                of_client = counts.setdefault(client if kind == "key" else None, {})
                of_client[what] = of_client.get(what, 0) + int(count)
            rows += [
                DayUsage(
                    date_of(day), key, *(found.get(name, 0) for name in ("requests", "prompt", "completion"))
                )
                for key, found in counts.items()
            ]
        return rows

    async def _all(self, key: str) -> dict[bytes, bytes]:
        # redis-py annotates its asyncio methods for both kinds of client.
        return await self._storage.call(lambda: self._storage.redis.hgetall(key))  # type: ignore[arg-type,return-value]

    async def _run(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        return await self._storage.call(lambda: script(keys, arguments))

    def _slots(self, client: Client) -> str:
        return f"{self._storage.prefix}:in_flight:{client.id}"

    def _bucket(self, client: Client) -> str:
        return f"{self._storage.prefix}:tokens:{client.id}"

    def _reserved(self, client: Client, day: int) -> str:
        return f"{self._storage.prefix}:reserved:{day}:{client.id}"

    def _day(self, day: int) -> str:
        return f"{self._storage.prefix}:usage:{day}"


def _field(client: Client) -> str:
    """Clients without a key are noted one by one only where each has a limit of its own by the day."""
    return client.id if client.key is not None or client.quotas.tokens_per_day else _NAMELESS


def _members(reserved: Mapping[str, int]) -> list[str]:
    return [f"{name}:{tokens}" for name, tokens in reserved.items()]
