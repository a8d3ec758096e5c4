"""When requests begin that come together."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable

_BEGIN_AT_ONCE = 8  # requests in one round of the event loop: each costs it half a millisecond


class Starts:
    """Lets a few requests begin in each round of the event loop, in the order in which they came."""

    def __init__(self) -> None:
        self._left = _BEGIN_AT_ONCE
        self._waiting: deque[Callable[[], None]] = deque()
        self._nobodys = contextvars.Context()

    def begin(self, start: Callable[[], None]) -> None:
        if not self._left:
            self._waiting.append(start)
            return
        if self._left == _BEGIN_AT_ONCE:
            # Or those who wait would inherit the variables of the request whose end has begun this one.
            asyncio.get_running_loop().call_soon(self._next_round, context=self._nobodys)
        self._left -= 1
        start()

    def _next_round(self) -> None:
        self._left = _BEGIN_AT_ONCE
        while self._waiting and self._left:
            self.begin(self._waiting.popleft())
