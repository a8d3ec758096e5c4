"""Chats that the server remembers, in memory or Redis, for who knows the id and has the same key."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import orjson
from cachetools import TTLCache

from .clients import current_client
from .errors import Conflict, InvalidRequest, NotFound
from .settings import ChatSettings
from .storage import SharedStorage, StorageAway

_ID_BYTES = 24
_LONGEST_ID = 64
_ATTEMPTS = 8
_OVERHEAD = 256  # bytes of a session besides its history

_MOST_CLIENTS = 10_000  # whose sessions are counted in memory
_UNLIMITED = 2**53

# Write version ARGV[1] unless somebody else has written it, or a later one, meanwhile; to have written it is
# no failure, as redis-py asks again where an answer is lost. KEYS[2] has those of the client by their last
# use, KEYS[3] everybody's, KEYS[4] their sizes, the sum under no name: when the client has more than ARGV[5],
# or all together are larger than ARGV[6], the first of them go. A Redis that is full may evict any of these
# keys: sizes without their sessions are forgotten.
_WRITE = """
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version == tonumber(ARGV[1]) and redis.call('HGET', KEYS[1], 'data') == ARGV[2] then return 1 end
if version >= tonumber(ARGV[1]) then return 0 end
local ttl, now = tonumber(ARGV[3]), tonumber(ARGV[4])
local function resize(key, size)
    local before = tonumber(redis.call('HGET', KEYS[4], key) or 0)
    redis.call('HSET', KEYS[4], key, size)
    redis.call('HINCRBY', KEYS[4], '', size - before)
end
local function drop(key)
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[3], key)
    resize(key, 0)
    redis.call('HDEL', KEYS[4], key)
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'data', ARGV[2])
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('ZADD', KEYS[2], ARGV[4], KEYS[1])
redis.call('EXPIRE', KEYS[2], ttl)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ttl)
if redis.call('ZCARD', KEYS[3]) == 0 then redis.call('DEL', KEYS[4]) end
redis.call('ZADD', KEYS[3], ARGV[4], KEYS[1])
resize(KEYS[1], tonumber(ARGV[7]))
local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - ttl, 'LIMIT', 0, 1000)
for _, key in ipairs(ended) do drop(key) end
while redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[5]) do
    drop(redis.call('ZPOPMIN', KEYS[2])[1])
end
while tonumber(redis.call('HGET', KEYS[4], '')) > tonumber(ARGV[6]) and redis.call('ZCARD', KEYS[3]) > 1 do
    drop(redis.call('ZRANGE', KEYS[3], 0, 0)[1])
end
redis.call('EXPIRE', KEYS[3], ttl)
redis.call('EXPIRE', KEYS[4], ttl)
return 1
"""


class Unset(Enum):
    UNSET = 0


UNSET = Unset.UNSET


class SessionNotFound(NotFound):
    code = "session_not_found"


@dataclass(slots=True)
class Session:
    owner: str
    """The name of the key that made it; empty where there was none."""
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    """`{"role": "user" or "assistant", "content": "…"}`, the oldest first."""
    tokens: int = 0
    """Of the whole prompt with the last answer, as the engine counted them; 0 where that is not known."""
    version: int = 0

    def size(self) -> int:
        """Of the history, in bytes."""
        return history_bytes(self.messages) + len((self.system or "").encode())


def history_bytes(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


class _Stored(NamedTuple):
    version: int
    data: bytes

    def size(self) -> int:
        """Of all of it, in bytes."""
        return len(self.data) + _OVERHEAD


class Sessions:
    """One read or write a message, however many connections wait: connections hold an id only.

    With Redis, what this process wrote is in its memory too, so it goes on while Redis is away. Of several
    versions the latest counts.
    """

    def __init__(self, settings: ChatSettings, storage: SharedStorage | None = None) -> None:
        self._ttl = settings.session_ttl_seconds
        self._most_messages, self._most_bytes = settings.max_history_messages, settings.max_history_bytes
        self._memory: TTLCache[str, _Stored] = TTLCache(
            settings.max_sessions_bytes, self._ttl, getsizeof=_Stored.size
        )
        self._most_in_all = settings.max_sessions_bytes
        self._most_per_client = settings.max_sessions_per_client or _UNLIMITED
        # The ids of each client's, the one used last at the end.
        self._of_client: TTLCache[str, dict[str, None]] = TTLCache(_MOST_CLIENTS, self._ttl)
        self._storage = storage
        start = f"{storage.prefix}:all_sessions" if storage else ""
        self._all, self._sizes = f"{start}:used", f"{start}:sizes"
        self._write = storage.redis.register_script(_WRITE) if storage else None

    @staticmethod
    def new_id() -> str:
        return secrets.token_urlsafe(_ID_BYTES)

    async def find(self, session_id: str, owner: str) -> Session | None:
        """None where there is none (any more). Raises `SessionNotFound` for another's, `StorageAway`."""
        if len(session_id) > _LONGEST_ID:
            return None
        stored = await self._read(session_id)
        if stored is None:
            return None
        found, system, tokens, messages = orjson.loads(stored.data)
        if found != owner:
            raise SessionNotFound(_NOT_FOUND)
        return Session(found, system, messages, tokens, stored.version)

    async def resume(self, session_id: str, owner: str) -> Session:
        """Raises `SessionNotFound`, the same for another's as for none; `StorageAway`."""
        if (session := await self.find(session_id, owner)) is None:
            raise SessionNotFound(_NOT_FOUND)
        return session

    async def update(self, session_id: str, owner: str, change: Callable[[Session], None]) -> Session:
        """Read, change and write it, or a new one; again when another connection wrote it meanwhile.

        Raises `SessionNotFound`, `StorageAway`.
        """
        for _ in range(_ATTEMPTS):
            session = await self.find(session_id, owner) or Session(owner)
            change(session)
            session.version += 1
            data = orjson.dumps([owner, session.system, session.tokens, session.messages])
            if await self._put(session_id, _Stored(session.version, data)):
                return session
        raise Conflict("Other connections change this session all the time. Try again.", code="session_busy")

    async def edit(
        self,
        session_id: str,
        owner: str,
        *,
        system: str | Unset | None = UNSET,
        messages: list[dict[str, str]] | Unset = UNSET,
    ) -> Session:
        """Write what is given in place of what there was. Raises `InvalidRequest` where that is too much."""

        def change(session: Session) -> None:
            session.tokens = 0
            if not isinstance(system, Unset):
                session.system = system or None
            if not isinstance(messages, Unset):
                session.messages = messages
            if len(session.messages) > self._most_messages or session.size() > self._most_bytes:
                raise InvalidRequest(
                    f"A history has at most {self._most_messages:,} messages and {self._most_bytes:,} bytes.",
                    code="history_too_large",
                )

        return await self.update(session_id, owner, change)

    async def _read(self, session_id: str) -> _Stored | None:
        local = self._memory.get(session_id)
        if local is not None:
            self._keep(session_id, local, written=False)  # its time begins anew
        if self._storage is None:
            return local
        try:
            shared = await self._storage.call(lambda: self._fetch(session_id))
        except StorageAway:
            if local is None or not self._fail_open:
                raise
            return local
        return max(filter(None, (local, shared)), default=None)

    async def _fetch(self, session_id: str) -> _Stored | None:
        key = self._key(session_id)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(key, "version", "data")
            pipe.expire(key, self._ttl)
            pipe.zadd(self._index(), {key: time.time()}, xx=True)
            pipe.expire(self._index(), self._ttl)
            pipe.zadd(self._all, {key: time.time()}, xx=True)
            pipe.expire(self._all, self._ttl)
            pipe.expire(self._sizes, self._ttl)
            (version, data), *_ = await pipe.execute()
        return None if version is None else _Stored(int(version), data)

    async def _put(self, session_id: str, stored: _Stored) -> bool:
        """Whether nobody else was faster."""
        if self._storage is not None and (write := self._write) is not None:
            keys = [self._key(session_id), self._index(), self._all, self._sizes]
            limits = [self._most_per_client, self._most_in_all, stored.size()]
            arguments: list[Any] = [stored.version, stored.data, self._ttl, time.time(), *limits]
            try:
                if not await self._storage.call(lambda: write(keys, arguments)):
                    self._memory.pop(session_id, None)
                    return False
            except StorageAway:
                if not self._fail_open:
                    raise
        self._keep(session_id, stored, written=True)
        return True

    def _keep(self, session_id: str, stored: _Stored, *, written: bool) -> None:
        """In memory, as the one used last."""
        self._memory.pop(session_id, None)
        with contextlib.suppress(ValueError):  # larger than the whole memory, which only escapes can make it
            self._memory[session_id] = stored
        names: dict[str, None] = self._of_client.get(_client(), {})
        if written or session_id in names:  # who only knows another's id has no part in it
            names.pop(session_id, None)
            names[session_id] = None
            self._of_client[_client()] = names
        while len(names) > self._most_per_client:
            del names[oldest := next(iter(names))]
            self._memory.pop(oldest, None)

    def _key(self, session_id: str) -> str:
        assert self._storage is not None
        return f"{self._storage.prefix}:session:{session_id}"

    def _index(self) -> str:
        assert self._storage is not None
        return f"{self._storage.prefix}:sessions:{_client()}"

    @property
    def _redis(self) -> Any:  # redis-py annotates its asyncio methods for both kinds of client
        assert self._storage is not None
        return self._storage.redis

    @property
    def _fail_open(self) -> bool:
        return self._storage is None or self._storage.fail_open


def _client() -> str:
    client = current_client.get()
    return client.id if client else ""


_NOT_FOUND = "There is no such session: it was not used for long, or another key made it. Begin a new one."
