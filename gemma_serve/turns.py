"""Some in each round of the event loop: what comes by hundreds must not keep a probe waiting."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable

AT_ONCE = 8  # requests that begin or end: each costs half a millisecond


class Turns:
    """Calls what it is given: at once, or in a later round, in the order in which it came."""

    def __init__(self) -> None:
        self._left = AT_ONCE
        self._waiting: deque[Callable[[], object]] = deque()
        self._nobodys = contextvars.Context()

    def take(self, call: Callable[[], object]) -> None:
        if not self._left:
            self._waiting.append(call)
            return
        if self._left == AT_ONCE:
            # Or those who wait would inherit the variables of the request that has taken the first turn.
            asyncio.get_running_loop().call_soon(self._next_round, context=self._nobodys)
        self._left -= 1
        call()

    def _next_round(self) -> None:
        self._left = AT_ONCE
        while self._waiting and self._left:
            self.take(self._waiting.popleft())
