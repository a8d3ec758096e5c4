"""Going down without losing a request: seem unready, then refuse what is new, then wait for what runs."""

from __future__ import annotations

import asyncio


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
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
