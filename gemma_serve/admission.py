"""Who goes to the engine next, and who is told to come back later.

The engine takes as many requests as it can work on at once; the rest wait here, where the order is fair and
a refusal costs microseconds. Order: by priority class, then by weighted fair queueing over the clients, so
that one client's burst delays only itself (start-time fair queueing: Goyal, Vin, Cheng, SIGCOMM 1996).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable

from .clients import Client
from .errors import Overloaded
from .settings import QueueSettings
from .token_usage import BYTES_PER_TOKEN

_COST_OF_A_REQUEST = 256  # in tokens, besides its prompt's
_RATE_SAMPLES = 64
_MOST_GONE = 64  # in the heap
_MOST_TAGS = 4096  # clients remembered while the queue is never empty
_RETRY_AFTER_UNKNOWN, _LONGEST_RETRY_AFTER = 5, 60


_ANYBODY = Client("")


class Admission:
    """A bounded, fair queue in front of the engine.

    `capacity` is how many answers the engine can work on at once; the last request admitted may go beyond it.
    While it is `paused`, as while a dead one is replaced, nobody has waited too long.
    """

    def __init__(
        self,
        settings: QueueSettings,
        capacity: Callable[[], int],
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._capacity = capacity
        self._paused = paused
        self._running = 0
        self._waiting: list[_Waiter] = []  # a heap
        self._waiting_requests = 0
        self._waiting_tokens = 0
        self._virtual_time = 0.0
        self._last_tag: dict[str, float] = {}
        self._released: deque[float] = deque(maxlen=_RATE_SAMPLES)
        self._busy_since = 0.0
        self.rejections: Counter[str] = Counter()
        """How many were refused since the start, by the limit that they met."""

    def beside(self, places: int) -> Admission:
        """Another queue with the same limits, before something that does `places` at once."""
        other = Admission(self._settings, lambda: places)
        other.rejections = self.rejections
        return other

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting_requests

    @property
    def running(self) -> int:
        """Answers that the engine may work on now."""
        return self._running

    @property
    def full(self) -> bool:
        """Would the next request be refused? Not where the limit is 0: then nothing is meant to wait here."""
        limits = self._settings
        return bool(self._waiting_requests) and (
            self._waiting_requests >= limits.max_requests or self._waiting_tokens >= limits.max_tokens
        )

    def require_room(self, body_bytes: int = 0) -> None:
        """Raise `Overloaded` when a request of this size would find the queue full."""
        limits = self._settings
        if not self._waiting_requests and self._has_room():
            return
        if self._waiting_requests >= limits.max_requests:
            raise self._refusal("queue_requests", f"{self._waiting_requests} requests wait already")
        tokens = body_bytes // BYTES_PER_TOKEN if self._waiting_requests else 0
        if self._waiting_tokens + tokens > limits.max_tokens:
            raise self._refusal(
                "queue_tokens", f"requests of about {self._waiting_tokens} tokens wait already"
            )

    async def enter(self, body_bytes: int, answers: int = 1, client: Client | None = None) -> Slot:
        """Wait for a place in the engine; `leave` it however the work ends. Raises `Overloaded`."""
        if self._waiting_requests or not self._has_room():
            self.require_room(body_bytes)
            await self._wait(body_bytes // BYTES_PER_TOKEN, answers, client or _ANYBODY)
        else:
            self._running += answers
        return Slot(self, answers)

    def _release(self, answers: int) -> None:
        self._running -= answers
        self._released.append(time.monotonic())
        self._admit()

    def _has_room(self) -> bool:
        # One place is enough, however many answers a request wants; the others wait in the engine. Here it
        # would keep all behind it waiting while places are free, until the engine is empty if need be.
        return self._running < self._capacity()

    async def _wait(self, tokens: int, answers: int, client: Client) -> None:
        start = max(self._virtual_time, self._last_tag.pop(client.id, 0.0))
        cost = (tokens + _COST_OF_A_REQUEST) * answers / client.weight
        self._last_tag[client.id] = start + cost
        if len(self._last_tag) > _MOST_TAGS:
            del self._last_tag[next(iter(self._last_tag))]  # who has asked for nothing for longest
        waiter = _Waiter(client.priority, start, answers, tokens)
        heapq.heappush(self._waiting, waiter)
        if not self._waiting_requests:
            self._busy_since = time.monotonic()
        self._waiting_requests += 1
        self._waiting_tokens += tokens
        admitted = False
        try:
            while not waiter.admitted.done():
                await asyncio.wait((waiter.admitted,), timeout=self._settings.wait_seconds)
                if not waiter.admitted.done() and not self._paused():
                    raise self._refusal(
                        "queue_wait", f"no place came free in {self._settings.wait_seconds:g} s"
                    )
            admitted = True
        finally:
            if not admitted:
                self._withdraw(waiter)
                if client.id in self._last_tag:
                    self._last_tag[client.id] -= cost  # who was not served has not taken its share

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter.admitted.cancel():
            self._leave(waiter)
            if len(self._waiting) > 2 * self._waiting_requests + _MOST_GONE:
                self._waiting = [one for one in self._waiting if not one.admitted.cancelled()]
                heapq.heapify(self._waiting)
        else:  # admitted in the same moment in which its client left
            self._running -= waiter.answers
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0].admitted.cancelled() or self._has_room()):
            waiter = heapq.heappop(self._waiting)
            if waiter.admitted.cancelled():
                continue
            self._virtual_time = max(self._virtual_time, waiter.start)
            self._running += waiter.answers
            self._leave(waiter)
            waiter.admitted.set_result(None)
        if not self._waiting_requests:
            self._last_tag.clear()

    def _leave(self, waiter: _Waiter) -> None:
        self._waiting_requests -= 1
        self._waiting_tokens -= waiter.tokens

    def _refusal(self, limit: str, why: str) -> Overloaded:
        self.rejections[limit] += 1
        return Overloaded(
            f"The server is busy: {why}. Try again later.", retry_after=self.seconds_until_room()
        )

    def seconds_until_room(self) -> int:
        """How long the queue that waits now takes, at the rate at which requests ended lately."""
        ended = sum(moment >= self._busy_since for moment in self._released)
        if not ended:
            return _RETRY_AFTER_UNKNOWN
        since = max(self._busy_since, self._released[0])
        needed = (time.monotonic() - since) / ended * (self._waiting_requests + 1)
        return max(1, min(_LONGEST_RETRY_AFTER, math.ceil(needed)))


class Slot:
    """A place in the engine."""

    __slots__ = ("_admission", "_answers")

    def __init__(self, admission: Admission, answers: int) -> None:
        self._admission: Admission | None = admission
        self._answers = answers

    def leave(self) -> None:
        """Make room for the next; a second call does nothing."""
        if self._admission is not None:
            self._admission._release(self._answers)
            self._admission = None


_arrival = itertools.count()


class _Waiter:
    __slots__ = ("admitted", "answers", "order", "start", "tokens")

    def __init__(self, priority: int, start: float, answers: int, tokens: int) -> None:
        self.order = (priority, start, next(_arrival))
        self.start = start
        self.answers = answers
        self.tokens = tokens
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: _Waiter) -> bool:
        return self.order < other.order
