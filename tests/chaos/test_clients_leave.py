"""Clients that leave at any moment, and clients that stop reading: the engine is soon as idle as before."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random

import httpx
import psutil
import pytest

from gemma_serve.engine.base import EngineState

from ..conftest import InProcess, until
from ..processes import below
from .conftest import FULL

pytestmark = pytest.mark.asyncio(loop_scope="session")

WARM_UP, LEAVING, AT_ONCE = 100, 500, 100
STOPPED = 50


def idle(server: InProcess) -> bool:
    return server.unfinished() == 0 and server.admission.running == 0 and server.admission.waiting == 0


async def settled(server: InProcess) -> None:
    """Until nothing is left to do, and the scheduler has said so."""
    await until(lambda: idle(server), 30)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    await until(lambda: idle(server), 30)
    stats = server.scheduler_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0.0)


async def leave(url: str, number: int, places: asyncio.Semaphore) -> None:
    """Ask, in one of many ways, and be gone after a random time, or at a random token."""
    chance = random.Random(number)
    body = {
        "messages": [{"role": "user", "content": "word " * chance.randrange(1, 400)}],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": chance.random() < 0.7,
        "n": chance.choice([1, 1, 1, 3]),
        "temperature": 0.7,
    }
    async with places, httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            async with asyncio.timeout(chance.random() * 2):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = chance.randrange(200)
                    async for _ in answer.aiter_lines():
                        lines -= 1
                        if lines < 0:
                            break
        except TimeoutError:
            pass


async def test_random_disconnects(in_process: InProcess) -> None:
    places = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(leave(in_process.url, number, places) for number in range(WARM_UP)))
    await settled(in_process)
    gc.collect()
    tasks, memory = len(asyncio.all_tasks()), psutil.Process().memory_info().rss
    await asyncio.gather(*(leave(in_process.url, number, places) for number in range(LEAVING)))
    await settled(in_process)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    gc.collect()
    grown = psutil.Process().memory_info().rss - memory
    print(f"{LEAVING} clients left; the process grew by {grown / 1e6:.1f} MB")
    assert grown < 100e6


async def test_readers_that_stop(in_process: InProcess) -> None:
    await settled(in_process)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = in_process.url.removeprefix("http://").split(":")
    connections = [await asyncio.open_connection(host, int(port), limit=1) for _ in range(STOPPED)]
    for reader, writer in connections:
        writer.write(head + body)
        await reader.read(1)
    # They read no further; whoever reads is served meanwhile.
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        answer = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 20})
        assert answer.status_code == 200
    for _, writer in connections:
        writer.transport.abort()
    await settled(in_process)


async def test_clients_that_leave_while_the_engine_is_replaced(in_process: InProcess) -> None:
    await settled(in_process)
    body = {"prompt": "Hi", "max_tokens": 900, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        begun = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(8)]
        await until(lambda: in_process.unfinished() == 8)
        engines = below(os.getpid(), "EngineCore")
        (engine,) = [each for each in engines if each.ppid() == os.getpid()]  # not the other servers'
        engine.kill()
        await until(lambda: in_process.engine.status.state is EngineState.RESTARTING)
        held = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(8)]
        await until(lambda: in_process.unfinished() == 16)
        for task in (*begun, *held[1:]):
            task.cancel()
        await until(lambda: in_process.unfinished() == 1)
        assert (await client.get("/health/live")).status_code == 200
    assert held[0].cancelled() or not held[0].done()
    held[0].cancel()
    await asyncio.gather(*begun, *held, return_exceptions=True)
    await until(lambda: in_process.engine.status.ready, 120)
    await settled(in_process)


@pytest.mark.skipif(not FULL, reason="`make chaos` runs it")
async def test_random_disconnects_many_times(in_process: InProcess) -> None:
    for _ in range(10):
        await test_random_disconnects(in_process)
