"""The server's own end: nothing that runs is cut, and no process stays behind."""

from __future__ import annotations

import asyncio
import signal

import httpx
import psutil

from ..conftest import start_server, until
from .load import Load


def below(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


async def test_sigterm_lets_all_streams_finish() -> None:
    server = start_server("--config", "demo", "--set", "server.drain_delay_seconds=1")
    load = Load(server.url, 64)
    try:
        await asyncio.to_thread(server.wait_ready)
        children = below(server.process.pid)
        running = asyncio.create_task(load.run())
        await until(lambda: load.tokens > 300, 120)
        server.process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            # In the delay: not ready, yet what a lagging load balancer sends is served.
            while (await client.get("/health/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            late = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
            assert late.status_code == 200
        answers = await running
        assert not [answer for answer in answers if isinstance(answer, BaseException)]
        assert await asyncio.to_thread(server.wait, 30) == 0
        assert gone(children)
    finally:
        server.end()
        await load.aclose()


async def test_sigkill_leaves_no_engine_behind() -> None:
    server = start_server("--config", "demo")
    try:
        await asyncio.to_thread(server.wait_ready)
        children = below(server.process.pid)
        assert any("EngineCore" in child.name() for child in children)
        server.process.kill()
        await until(lambda: gone(children), 20)
    finally:
        server.end()


async def test_sigkill_while_loading_leaves_nothing_behind() -> None:
    server = start_server("--config", "demo")
    try:
        await until(lambda: any("EngineCore" in child.name() for child in below(server.process.pid)), 120)
        children = below(server.process.pid)
        server.process.kill()
        await until(lambda: gone(children), 60)
    finally:
        server.end()


async def test_a_second_signal_ends_it_at_once() -> None:
    server = start_server("--config", "demo", "--set", "server.shutdown_timeout_seconds=600")
    load = Load(server.url, 8)
    try:
        await asyncio.to_thread(server.wait_ready)
        children = below(server.process.pid)
        running = asyncio.create_task(load.run())
        await until(lambda: load.tokens > 10, 120)
        server.process.send_signal(signal.SIGINT)
        await until(lambda: "Shutting down" in server.text)
        server.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(server.wait, 20) == 0
        await until(lambda: gone(children), 20)
        await running
    finally:
        server.end()
        await load.aclose()
