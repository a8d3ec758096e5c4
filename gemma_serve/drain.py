"""Going down without losing a request: seem unready, then refuse what is new, then wait for what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Drain:
    """Which stage the server's end has reached, and how many requests are under way."""

    def __init__(self) -> None:
        self.begun = False
        """Not ready any more, but new requests are still served: load balancers lag."""
        self.refusing = False
        """New requests get 503."""
        self.active = 0
        self.drained = 0
        """Requests that have ended since it began."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.on_refusing: list[Callable[[], None]] = []
        """Called when new requests are refused from now on: who holds connections open lets them go."""
        self.on_overdue: list[Callable[[], None]] = []
        """Called when the time is up for what still runs."""

    def enter(self) -> None:
        self.active += 1
        self._idle.clear()

    def leave(self) -> None:
        self.active -= 1
        self.drained += self.begun
        if not self.active:
            self._idle.set()

    async def run(self, delay: float, grace: float) -> bool:
        """Go through the stages; true when all requests have ended within `grace` seconds."""
        self.begun = True
        await asyncio.sleep(delay)
        self.refusing = True
        for call in self.on_refusing:
            call()
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            for call in self.on_overdue:
                call()
            return False
        return True
