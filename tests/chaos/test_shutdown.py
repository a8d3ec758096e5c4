"""The server's own end: no process stays behind, and a deploy loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from pathlib import Path

import httpx
import pytest

from ..conftest import ServerProcess, start_fake, start_server, until
from ..processes import below, gone
from .conftest import FULL

REQUESTS = 2000
DRAIN_SECONDS = 6  # the balancer asks five times a second, and a busy machine may keep it waiting
HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout check 10s
frontend front
    bind 127.0.0.1:{front}
    default_backend servers
backend servers
    balance leastconn
    option httpchk GET /health/ready
    default-server check inter 200ms fall 1 rise 1
    server a 127.0.0.1:{a}
    server b 127.0.0.1:{b}
"""


@pytest.mark.parametrize("moment", ["loading", "ready"])
async def test_sigkill_leaves_no_engine_behind(moment: str) -> None:
    server = start_server("--config", "demo")
    try:
        if moment == "ready":
            await asyncio.to_thread(server.wait_ready)
        else:
            await until(lambda: bool(below(server.process.pid, "EngineCore")), 120)
        children = below(server.process.pid)
        assert children
        server.process.kill()
        await until(lambda: gone(children), 60)
    finally:
        server.end()


async def test_a_second_signal_ends_it_at_once() -> None:
    server = start_fake(server={"shutdown_timeout_seconds": 600})
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            hanging = {"messages": [{"role": "user", "content": "hang"}]}
            running = asyncio.create_task(client.post("/v1/chat/completions", json=hanging))
            await until(lambda: "at work" in server.text)
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: "Shutting down" in server.text)
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.wait, 20) == 0
            with contextlib.suppress(httpx.HTTPError):
                assert (await running).status_code == 503
            assert "Traceback" not in server.text
    finally:
        server.end()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


async def balanced(probe: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await probe.get("/health/ready")).status_code == 200
    return False


async def test_a_rolling_restart_loses_no_request(tmp_path: Path) -> None:
    front, *ports = free_ports(3)
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(front=front, a=ports[0], b=ports[1]))

    def start_one(port: int) -> ServerProcess:
        if FULL:
            delay = f"server.drain_delay_seconds={DRAIN_SECONDS}"
            return start_server("--config", "demo", "--set", delay, "--port", str(port))
        return start_fake(server={"port": port, "drain_delay_seconds": DRAIN_SECONDS})

    async def ready(server: ServerProcess) -> None:
        await asyncio.to_thread(server.wait_ready)

    servers = [start_one(port) for port in ports]
    balancer = await asyncio.create_subprocess_exec("haproxy", "-q", "-f", str(tmp_path / "haproxy.cfg"))
    try:
        await asyncio.gather(*map(ready, servers))
        done, restarted = 0, asyncio.Event()
        statuses: dict[str, int] = {}

        async def client() -> None:
            nonlocal done
            body = {"model": "gemma-demo", "prompt": "Hi", "max_tokens": 3}
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front}", timeout=60) as http:
                while done < REQUESTS or not restarted.is_set():
                    done += 1
                    try:
                        status = str((await http.post("/v1/completions", json=body)).status_code)
                    except httpx.HTTPError as error:
                        status = repr(error)
                    statuses[status] = statuses.get(status, 0) + 1

        async def restart_all() -> None:
            await until(lambda: done > 100, 60)
            for index, port in enumerate(ports):
                assert await asyncio.to_thread(servers[index].end) == 0
                servers[index] = start_one(port)
                await ready(servers[index])
                # Balanced before the next goes: as Kubernetes waits for `minReadySeconds`.
                mark = servers[index].text.count("POST")
                await until(lambda: servers[index].text.count("POST") > mark, 60)  # noqa: B023
            restarted.set()

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{front}", timeout=60) as probe:
            async with asyncio.timeout(60):  # until the balancer listens, and has seen both
                while not await balanced(probe):
                    await asyncio.sleep(0.05)
        await asyncio.gather(restart_all(), *(client() for _ in range(8)))
        print(f"{done} requests through two restarts: {statuses}")
        assert statuses == {"200": done}
        assert done >= REQUESTS
    finally:
        balancer.terminate()
        await balancer.wait()
        for server in servers:
            server.end()
