"""Work that is repeated in the background while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def every(seconds: float, work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Within it, `work` is done and then again after each pause. Its end waits for work under way."""
    ending = asyncio.Event()

    async def repeat() -> None:
        while not ending.is_set():
            try:
                await work()
            except Exception:
                logger.exception("Background work failed; it is tried again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await ending.wait()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        ending.set()  # and no cancelling, which redis-py may swallow
        await task
