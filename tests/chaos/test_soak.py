"""`make soak`: mixed load for a long time, with clients that leave. Memory must not go on growing."""

from __future__ import annotations

import asyncio
import os
import statistics
import time

import psutil
import pytest

from ..conftest import start_server
from .load import Load
from .test_clients_leave import AT_ONCE, leave

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))


@pytest.mark.skipif(not MINUTES, reason="`make soak` runs it")
@pytest.mark.timeout(MINUTES * 60 + 900)
async def test_memory_stays_where_it_is() -> None:
    server = start_server("--config", "demo")
    load = Load(server.url, 48)
    samples: list[float] = []
    try:
        await asyncio.to_thread(server.wait_ready)
        process = psutil.Process(server.process.pid)
        end = time.monotonic() + MINUTES * 60
        places = asyncio.Semaphore(AT_ONCE)
        wanted = None
        while time.monotonic() < end:
            leaving = [leave(server.url, len(samples) * 50 + number, places) for number in range(50)]
            answers, *_ = await asyncio.gather(load.run(), *leaving)
            wanted = wanted or answers
            assert answers == wanted, "an answer failed or changed"
            samples.append(process.memory_info().rss / 1e6)
            left = (end - time.monotonic()) / 60
            print(f"round {len(samples)}: {samples[-1]:.0f} MB, {left:.1f} minutes left", flush=True)
    finally:
        assert server.end() == 0
        await load.aclose()
    # The first half fills caches and arenas; from there on it should be flat.
    quarter = max(1, len(samples) // 4)
    third, last = (statistics.median(part) for part in (samples[-2 * quarter : -quarter], samples[-quarter:]))
    print(f"{len(samples)} rounds; {third:.0f} MB in the third quarter, {last:.0f} MB in the last")
    assert last <= third * 1.05
