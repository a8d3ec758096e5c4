"""The Redis that several servers share, and what happens while it is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import Unavailable
from .settings import StorageSettings

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool, Redis

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_CONNECTIONS = 64
_PAUSE_SECONDS = 1.0  # after a failure; a request must not wait for the time-out of every call
_LOG_SECONDS = 60.0


class StorageAway(Unavailable):
    """Redis did not answer; whether requests pass then is the setting `storage.fail_open`."""

    code = "storage_unavailable"


class SharedStorage:
    def __init__(self, settings: StorageSettings) -> None:
        assert settings.url is not None
        # Takes half a second to import, and not every server needs it.
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self.fail_open = settings.fail_open
        self.prefix = settings.prefix
        self.timeout = settings.timeout_seconds
        self.pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            settings.url,
            max_connections=_MAX_CONNECTIONS,
            timeout=settings.timeout_seconds,
            socket_timeout=settings.timeout_seconds,
            socket_connect_timeout=settings.timeout_seconds,
            retry=Retry(NoBackoff(), 1),  # for a connection that Redis has closed meanwhile
        )
        self.redis: Redis = Redis(connection_pool=self.pool)
        self._errors = (RedisError, OSError, TimeoutError)
        self._places = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._paused_until = self._silent_until = 0.0
        self._away_since: float | None = None

    @property
    def away(self) -> bool:
        """Did it fail to answer the last time?"""
        return self._away_since is not None

    @property
    def away_seconds(self) -> float:
        """For how long it has not answered."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, which talks to Redis. Raises `StorageAway` within the setting's time."""
        if time.monotonic() < self._paused_until:
            raise self._error()
        # In a task of its own: redis-py, cancelled while it waits, at times goes on as if nothing had been.
        task = asyncio.create_task(self._bounded(work))
        task.add_done_callback(_seen)
        try:
            result = await asyncio.shield(task)
        except self._errors as error:
            raise self._error() from error
        if self.away:
            self._away_since = None
            logger.warning("Redis is back")
        return result

    async def _bounded(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._places:  # a burst waits here, rather than take its own length for Redis's silence
            if time.monotonic() < self._paused_until:
                raise self._error()
            try:
                async with asyncio.timeout(self.timeout):
                    return await work()
            except self._errors as error:
                self._note(error)  # before the next has this place, and waits as long
                raise

    def _note(self, error: BaseException) -> None:
        now = time.monotonic()
        self._paused_until = now + _PAUSE_SECONDS
        if self._away_since is None:
            self._away_since = now
        if now >= self._silent_until:
            self._silent_until = now + _LOG_SECONDS
            then = "requests pass without limits" if self.fail_open else "requests are refused"
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.error("Redis cannot be used (%s); meanwhile %s", reason, then)

    def _error(self) -> StorageAway:
        return StorageAway("This server's storage does not answer. Try again shortly.", retry_after=1)

    async def aclose(self) -> None:
        await self.redis.aclose()
        await self.pool.aclose()


def _seen(task: asyncio.Task[Any]) -> None:
    """An error after the caller has gone concerns nobody."""
    if not task.cancelled():
        task.exception()
