"""Clients that are refused for a while: for many wrong keys, or for going on over their limits."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any, Literal, NamedTuple

import orjson

from .errors import RateLimited
from .periodic import every
from .settings import SecuritySettings
from .storage import SharedStorage, StorageAway

logger = logging.getLogger(__name__)

Reason = Literal["authentication", "limit"]

_REFRESH_SECONDS = 1.0
_REMEMBERED_SECONDS = 86_400  # for so long, another block is longer than the last
_FEWEST_COUNTS = 1024

# Counts in KEYS[1] for ARGV[2] seconds; at ARGV[1], gives the how-many-th block in KEYS[2] this is.
_STRIKE = """
local count = redis.call('INCR', KEYS[1])
if count == 1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
if count < tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[1])
local offences = redis.call('INCR', KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return offences
"""


class Blocked(RateLimited):
    code = "client_blocked"


class Block(NamedTuple):
    client: str
    """`ip:<address>` or `key:<name>`."""
    reason: Reason
    offence: int
    """The how-many-th block of this client within a day."""
    until: float
    """Seconds since 1970."""


class Blocks:
    """Every process knows all blocks, so a check costs nothing; with `storage` they are shared within 1 s.

    While Redis is away, each process counts and blocks by itself, and tells Redis later.
    """

    def __init__(self, settings: SecuritySettings, storage: SharedStorage | None = None) -> None:
        self._after = {
            "authentication": settings.block_after_failures,
            "limit": settings.block_after_limit_hits,
        }
        self._window = settings.block_window_seconds
        self._first, self._longest = settings.block_seconds, settings.block_max_seconds
        self._storage = storage
        self._script = storage.redis.register_script(_STRIKE) if storage else None
        self._key = f"{storage.prefix}:blocks" if storage else ""
        self._blocks: dict[str, Block] = {}
        self._untold: dict[str, Block] = {}
        """Those of ours that Redis does not know yet."""
        self._counts: dict[str, tuple[int, float]] = {}
        self._sweep_at = _FEWEST_COUNTS
        self.refused = 0
        """Requests of blocked clients since the start."""

    def check(self, client: str, reason: Reason | None = None) -> None:
        """Raises `Blocked` while the client is, for that reason or for any."""
        if not self._blocks or (block := self._blocks.get(client)) is None:
            return
        if reason not in (None, block.reason):
            return
        left = block.until - time.time()
        if left <= 0:
            del self._blocks[client]
            return
        self.refused += 1
        why = (
            "many wrong API keys" if block.reason == "authentication" else "too many requests over the limit"
        )
        raise Blocked(f"Refused for another {left:.0f} s, after {why}.", "requests", left)

    async def strike(self, client: str, reason: Reason) -> None:
        """Count a misdeed, and block the client when there have been too many."""
        if not self._after[reason]:
            return
        try:
            offence = await self._offence(client, reason)
        except StorageAway:  # logged there
            offence = self._offence_here(client, reason)
        if not offence:
            return
        seconds = min(self._longest, self._first * 2 ** min(offence - 1, 30))
        self._blocks[client] = block = Block(client, reason, offence, time.time() + seconds)
        logger.warning("Blocked %s for %g s (%s, offence %d)", client, seconds, reason, offence)
        if self._storage is not None:
            self._untold[client] = block
            with suppress(StorageAway):
                await self._tell()

    async def _tell(self) -> None:
        if told := dict(self._untold):
            assert self._storage is not None
            fields = {client: orjson.dumps(list(block)) for client, block in told.items()}
            await self._storage.call(lambda: self._redis.hset(self._key, mapping=fields))
            for client, block in told.items():
                if self._untold.get(client) is block:
                    del self._untold[client]

    async def list(self) -> list[Block]:
        """Those in force, the longest first. Raises `StorageAway`."""
        await self._refresh()
        now = time.time()
        return sorted(
            (block for block in self._blocks.values() if block.until > now), key=lambda it: -it.until
        )

    async def lift(self, client: str) -> bool:
        """Whether there was such a block. Its next one is as short as its first. Raises `StorageAway`."""
        found = self._blocks.pop(client, None) is not None
        self._untold.pop(client, None)
        for key in [f"{what}:{client}" for what in ("authentication", "limit", "offences")]:
            self._counts.pop(key, None)
        if self._storage is not None:
            names = [f"{self._key}:{what}:{client}" for what in ("authentication", "limit", "offences")]
            found |= bool(await self._storage.call(lambda: self._redis.hdel(self._key, client)))
            await self._storage.call(lambda: self._redis.delete(*names))
        if found:
            logger.warning("Lifted the block of %s", client)
        return found

    @property
    def _redis(self) -> Any:  # redis-py annotates its asyncio methods for both kinds of client
        assert self._storage is not None
        return self._storage.redis

    def shared(self) -> AbstractAsyncContextManager[None]:
        """Within it the blocks of other servers become known."""
        return every(_REFRESH_SECONDS, self._try_refresh) if self._storage else nullcontext()

    async def _try_refresh(self) -> None:
        with suppress(StorageAway):
            await self._refresh()

    async def _refresh(self) -> None:
        if self._storage is None:
            return
        await self._tell()
        found = await self._storage.call(lambda: self._redis.hgetall(self._key))
        blocks = [Block(*orjson.loads(value)) for value in found.values()]
        now = time.time()
        if over := [block.client for block in blocks if block.until <= now]:
            await self._storage.call(lambda: self._redis.hdel(self._key, *over))
        self._blocks = {block.client: block for block in blocks if block.until > now} | self._untold

    async def _offence(self, client: str, reason: Reason) -> int:
        """0 while it is too few, else the how-many-th block this is."""
        after, script = self._after[reason], self._script
        if self._storage is not None and script is not None:
            keys = [f"{self._key}:{reason}:{client}", f"{self._key}:offences:{client}"]
            arguments = [after, self._window, _REMEMBERED_SECONDS]
            return int(await self._storage.call(lambda: script(keys, arguments)))
        return self._offence_here(client, reason)

    def _offence_here(self, client: str, reason: Reason) -> int:
        """As `_offence`, counted in this process."""
        count = self._count(f"{reason}:{client}", self._window)
        if count < self._after[reason]:
            return 0
        del self._counts[f"{reason}:{client}"]
        return self._count(f"offences:{client}", _REMEMBERED_SECONDS, again=True)

    def _count(self, key: str, seconds: float, *, again: bool = False) -> int:
        """One more, forgotten `seconds` after the first, or with `again` after the last."""
        now = time.time()
        count, until = self._counts.get(key, (0, 0.0))
        if until <= now:
            count, until = 0, now + seconds
        self._counts[key] = count + 1, (now + seconds if again else until)
        if len(self._counts) > self._sweep_at:  # an attacker has many addresses
            self._counts = {name: entry for name, entry in self._counts.items() if entry[1] > now}
            self._blocks = {name: block for name, block in self._blocks.items() if block.until > now}
            self._untold = {name: block for name, block in self._untold.items() if block.until > now}
            self._sweep_at = max(_FEWEST_COUNTS, 2 * len(self._counts))
        return count + 1
