"""`RateLimiter` admits requests, HTTP or a WebSocket's messages; a `Lease` is what each of them holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from ..clients import Client
from ..errors import RateLimited
from ..periodic import every
from ..settings import Settings
from ..storage import SharedStorage, StorageAway
from .quotas import DayUsage, Entry, MemoryQuotas, Quotas, Reservation, today
from .redis_quotas import LEASE_SECONDS, RedisQuotas

if TYPE_CHECKING:
    from .window import RequestWindow, Window

logger = logging.getLogger(__name__)
_numbers = itertools.count()
T = TypeVar("T")


class RateLimiter:
    """Counts in `storage`, or in this process where there is none. `on_excess` hears who met a limit."""

    def __init__(
        self,
        settings: Settings,
        storage: SharedStorage | None = None,
        on_excess: Callable[[Client], Awaitable[None]] = lambda client: asyncio.sleep(0),
    ) -> None:
        self._on_excess = on_excess
        self._seconds = settings.security.rate_limit_window_seconds
        self._storage = storage
        self.id = uuid.uuid4().hex
        self._quotas: Quotas = RedisQuotas(storage) if storage else MemoryQuotas()
        self._leases: dict[str, Lease] = {}
        self.rejections: Counter[str] = Counter()
        """How many were refused here since the start, by the limit that they met."""
        self._settling: set[asyncio.Task[None]] = set()
        self._window: RequestWindow | None = None
        if settings.security.rate_limit_per_minute or settings.security.api_keys_file:
            self._requests()  # now, because importing it takes a while

    def in_flight(self) -> int:
        """Requests admitted here that have not ended."""
        return len(self._leases)

    def holds(self, lease: Lease) -> bool:
        return lease.slot in self._leases

    async def admit(self, client: Client) -> Lease:
        """Settle the lease however the request ends. Raises `RateLimited`, or `StorageAway` if so set."""
        try:
            return await self._admit(client)
        except RateLimited:
            await self._on_excess(client)
            raise

    async def _admit(self, client: Client) -> Lease:
        lease = Lease(self, client)
        if client.quotas.requests_per_minute:
            lease.window = window = await self._unless_away(self._requests().hit(client), None)
            if window is not None and not window.admitted:
                self.rejections["requests_per_minute"] += 1
                raise RequestsExceeded(
                    f"Rate limit reached for requests: {window.limit} per {self._seconds} s. Try again in "
                    f"{duration(window.reset)}.",
                    lease,
                    window.reset,
                )
        if client.quotas.in_flight or client.quotas.tokens_per_minute:
            entry = await self._enter(lease)
            lease.tokens_left = None if entry is None else entry.tokens_left
            lease.has_slot = entry is not None and entry.admitted
            if entry is not None and not entry.admitted:
                self.rejections["in_flight"] += 1
                raise RequestsExceeded(
                    f"Rate limit reached for requests at the same time: {client.quotas.in_flight}. Try again "
                    "when one has ended.",
                    lease,
                    1,
                )
        self._leases[lease.slot] = lease
        return lease

    async def _enter(self, lease: Lease) -> Entry | None:
        work = self._unless_away(self._quotas.enter(lease.client, lease.slot), None)
        if self._storage is None:
            return await work
        entering = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:  # Redis may give the slot all the same, to nobody
            self._see_to(self._give_back(lease, entering))
            raise

    async def _give_back(self, lease: Lease, entering: asyncio.Future[Entry | None]) -> None:
        (entry,) = await asyncio.gather(entering, return_exceptions=True)
        if isinstance(entry, Entry) and entry.admitted:
            await self._quotas.settle(lease.client, lease.slot, lease.day, {}, 0, 0)

    async def reserve(self, lease: Lease, tokens: int) -> None:
        """Raises `RateLimited`."""
        try:
            await self._reserve(lease, tokens)
        except RateLimited:
            await self._on_excess(lease.client)
            raise

    async def _reserve(self, lease: Lease, tokens: int) -> None:
        quotas = lease.client.quotas
        for limit, period in ((quotas.tokens_per_minute, "minute"), (quotas.tokens_per_day, "day")):
            if limit and tokens > limit:
                self.rejections[f"tokens_per_{period}"] += 1
                raise RateLimited(
                    f"Request too large: it may take {tokens:,} tokens, the limit is {limit:,} per {period}. "
                    "Shorten the prompt or lower max_tokens.",
                    "tokens",
                    None,
                )
        if lease.slot not in self._leases:
            return  # it has ended, and others go on with what it began: nothing would give this back
        if self._storage is None:
            result = await self._take(lease, tokens)
        else:  # to its end, also where the client leaves meanwhile: what Redis has given `settle` gives back
            lease.reserving = asyncio.ensure_future(self._take(lease, tokens))
            result = await asyncio.shield(lease.reserving)
        if result.short_of is not None:
            self.rejections[f"tokens_per_{result.short_of}"] += 1
            limit = quotas.tokens_per_day if result.short_of == "day" else quotas.tokens_per_minute
            raise RateLimited(
                f"Rate limit reached for tokens: {limit:,} per {result.short_of}, requested {tokens:,}. Try "
                f"again in {duration(result.wait)}.",
                "tokens",
                result.wait,
            )

    async def _take(self, lease: Lease, tokens: int) -> Reservation:
        free = Reservation(None, 0.0, 0.0)
        name = f"{self.id}-{next(_numbers)}"
        result = await self._unless_away(self._quotas.reserve(lease.client, lease.day, tokens, name), free)
        if result is not free:
            lease.tokens_left = result.tokens_left
            if result.short_of is None:
                lease.reserved[name] = tokens
        return result

    async def settle(self, lease: Lease, prompt_tokens: int, completion_tokens: int) -> None:
        if self._leases.pop(lease.slot, None) is None:
            return
        work = self._settle(lease, prompt_tokens, completion_tokens)
        if lease.until is not None:
            self._see_to(work)
            return
        if self._storage is None:
            await work  # never suspends, so it cannot be cancelled half-way
            return
        await asyncio.shield(self._see_to(work))

    def _see_to(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._quietly(work))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _settle(self, lease: Lease, prompt_tokens: int, completion_tokens: int) -> None:
        if lease.reserving is not None:
            await asyncio.gather(lease.reserving, return_exceptions=True)
        if lease.until is not None:
            await asyncio.wait((lease.until,))
        await self._quotas.settle(
            lease.client,
            lease.slot if lease.has_slot else None,
            lease.day,
            lease.reserved,
            prompt_tokens,
            completion_tokens,
        )

    async def usage(self, days: int) -> list[DayUsage]:
        """Of the last `days`, today included. Raises `StorageAway`."""
        return await self._quotas.usage(days)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within it the slots of running requests stay theirs; at its end what has ended is settled."""
        async with every(LEASE_SECONDS / 3, self._renew) if self._storage else contextlib.nullcontext():
            yield
        await asyncio.gather(*self._settling)

    async def _renew(self) -> None:
        for lease in [lease for lease in self._leases.values() if lease.has_slot or lease.reserved]:
            slot = lease.slot if lease.has_slot else None
            await self._quietly(self._quotas.renew(lease.client, slot, lease.day, lease.reserved))

    async def _quietly(self, work: Awaitable[None]) -> None:
        with contextlib.suppress(StorageAway):  # logged there
            await work

    async def _unless_away(self, work: Awaitable[T], otherwise: T) -> T:
        try:
            return await work
        except StorageAway:
            if self._storage is None or not self._storage.fail_open:
                raise
            return otherwise

    def _requests(self) -> RequestWindow:
        if self._window is None:
            from .window import RequestWindow

            self._window = RequestWindow(self._seconds, self._storage)
        return self._window


class Lease:
    """One admitted request: its slot in flight and its reserved tokens."""

    __slots__ = (
        "_limiter",
        "abandoned",
        "client",
        "day",
        "has_slot",
        "prompt_estimate",
        "reserved",
        "reserving",
        "slot",
        "tokens_left",
        "until",
        "window",
    )

    def __init__(self, limiter: RateLimiter, client: Client) -> None:
        self._limiter = limiter
        self.client = client
        self.slot = f"{limiter.id}-{next(_numbers)}"
        self.day = today()
        self.reserved: dict[str, int] = {}
        """Tokens by the reservation's name."""
        self.reserving: asyncio.Future[Reservation] | None = None
        self.has_slot = False
        self.prompt_estimate = 0
        self.abandoned = False
        """The client left before the engine said what the answer took: count the prompt, as estimated."""
        self.until: asyncio.Future[Any] | None = None
        """What others go on with, and what was reserved is for."""
        self.window: Window | None = None
        self.tokens_left: float | None = None

    @property
    def held(self) -> bool:
        """Has it not been settled yet?"""
        return self._limiter.holds(self)

    async def reserve(self, tokens: int) -> None:
        """Raises `RateLimited`."""
        await self._limiter.reserve(self, tokens)

    async def settle(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Give back what is held; only the first call does something."""
        if prompt_tokens is None:
            prompt_tokens = self.prompt_estimate if self.abandoned else 0
        await self._limiter.settle(self, prompt_tokens, completion_tokens or 0)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """As OpenAI's: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""
        headers = []
        if (window := self.window) is not None:
            headers += [
                (b"x-ratelimit-limit-requests", b"%d" % window.limit),
                (b"x-ratelimit-remaining-requests", b"%d" % window.remaining),
                (b"x-ratelimit-reset-requests", duration(window.reset).encode()),
            ]
        if (capacity := self.client.quotas.tokens_per_minute) and self.tokens_left is not None:
            until_full = (capacity - self.tokens_left) * 60 / capacity
            headers += [
                (b"x-ratelimit-limit-tokens", b"%d" % capacity),
                (b"x-ratelimit-remaining-tokens", b"%d" % max(0, self.tokens_left)),
                (b"x-ratelimit-reset-tokens", duration(until_full).encode()),
            ]
        return headers


class RequestsExceeded(RateLimited):
    """Refused at admission; `lease` was not given, but knows the headers."""

    def __init__(self, message: str, lease: Lease, retry_after: float) -> None:
        super().__init__(message, "requests", retry_after)
        self.lease = lease


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""What the request being served holds."""


async def reserve_tokens(estimate: Callable[[], tuple[int, int]]) -> None:
    """Reserve for a generation what `estimate` gives: tokens of its prompt and of its answer, at most.

    Costs nothing where the client has no token limit. Raises `RateLimited`.
    """
    lease = current_lease.get()
    if lease is not None and (lease.client.quotas.tokens_per_minute or lease.client.quotas.tokens_per_day):
        prompt, answer = estimate()
        await lease.reserve(prompt + answer)
        lease.prompt_estimate = prompt


def keep_reserved(until: asyncio.Future[Any]) -> None:
    """The request being served ends, and what it began goes on for others: nothing is given back before."""
    lease = current_lease.get()
    if lease is not None and lease.reserved:
        lease.until = until


def abandon() -> None:
    """Note that the request being served was left before its usage was known."""
    if (lease := current_lease.get()) is not None:
        lease.abandoned = True


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s".replace(".0s", "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
